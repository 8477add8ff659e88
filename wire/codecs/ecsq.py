"""Ecsq stage: entropy-coded scalar quantization with one step for all tensors, near the rate-distortion bound at every rate.

One step is reverse water-filling: where there is little energy, almost nothing is sent. Rank rows of about one scale share a
table of frequencies; levels are reconstructed at the centroids of their cells; `rans` codes them in as many bits as they inform.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np

from wire import spec
from wire.codecs import (
    Array,
    Fields,
    FieldShape,
    Shape,
    State,
    expect,
    fitting,
    kernels,
    rank_rows,
    rans,
    tables,
    trellis,
)
from wire.codecs.kernels import Ints
from wire.codecs.pack import COUNT_BYTES
from wire.codecs.rank_rows import RankRows
from wire.codecs.tables import Tables
from wire.delta import Vector
from wire.errors import PayloadError, Reason


@dataclasses.dataclass(frozen=True)
class Ecsq:
    """`values` float32 [n] -> `step` float32 [1], `tables` and `classes`, `escapes` and `words`.

    The update has `target_bits` a parameter, or `target_bytes`, and up to 2 % less, with everything that the stages before this
    one send beside the values. With `states` two quantizers take turns on paths through a trellis (`viterbi`).
    """

    target_bits: float = 0.2
    target_bytes: int | None = None
    states: Literal[8] | None = dataclasses.field(default=None, metadata=spec.LATER)
    id: ClassVar[str] = "ecsq"
    kind: ClassVar[Literal["fields"]] = "fields"

    def __post_init__(self) -> None:
        if not 0.001 <= self.target_bits <= 12 or (self.target_bytes is not None and self.target_bytes < 1):
            raise ValueError("target_bits must lie between 0.001 and 12, target_bytes be positive")

    @property
    def quantizers(self) -> int:
        """How many take turns."""
        return 1 if self.states is None else 2

    def emits(self, like: Shape) -> Shape:
        values = expect(like, "values", "float32")
        rows, size = rank_rows.of(values), values.length
        rest = {name: shape for name, shape in like.items() if name != "values"}
        return {
            **rest,
            "step": FieldShape("float32", 1),
            "tables": FieldShape("uint8", tables.longest(self.quantizers), bounded=True),
            "classes": FieldShape("uint16", len(rows) + 2, bounded=True),
            "escapes": FieldShape("int16", fitting.most_escapes(size), bounded=True),
            "words": FieldShape("uint16", size + 2 * rans.lanes(size), bounded=True),
        }

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        values = rank_rows.gathered(x["values"], like["values"].tensors)
        rows, rest = rank_rows.of(like["values"]), {name: field for name, field in x.items() if name != "values"}
        bits = 8 * self.target_bytes if self.target_bytes is not None else self.target_bits * len(values)
        encoder = fitting if self.states is None else trellis
        coded = encoder.fitted(values, rows, bits - 8 * self._beside(rest, like))
        made: Fields = {
            "step": np.array([coded.step], np.float32),
            "tables": coded.tables.to_bytes(),
            "classes": coded.classes,
        }
        return {**rest, **made, "escapes": coded.escapes, "words": coded.words(rows)}, {}

    def decode(self, y: Fields, like: Shape) -> Fields:
        parts = list(self.parts(y, like))
        values = rank_rows.scattered(np.concatenate(parts), like["values"].tensors)
        return {"values": values, **{name: field for name, field in y.items() if name in like}}

    def parts(self, y: Fields, like: Shape) -> Iterator[Vector]:
        """The values in row order, tensor after tensor. Raises PayloadError."""
        size, rows, step = like["values"].length, rank_rows.of(like["values"]), y["step"][0]
        if not 0 <= step < np.inf:
            raise PayloadError(Reason.BAD_PAYLOAD, "the step is negative or no finite number")
        found = tables.parse(y["tables"], self.quantizers)
        used = found.rows(y["classes"], len(rows), size)
        if (used >= found.count).any():
            raise PayloadError(Reason.BAD_PAYLOAD, "a row has a class that is not there")
        values, lookup = found.by_class(found.values(step)), found.by_class(rans.lookup(found.frequencies))
        reader = rans.Reader(y["words"], rans.lanes(size), int(rows.lengths.max()), size, self.quantizers)
        escapes = _Escapes(y["escapes"], found, step, size)
        for mine, part_rows in rank_rows.by_tensor(like["values"]):
            yield escapes.filled(reader.read(part_rows, used[mine], lookup, values), part_rows, used[mine])
        reader.close()
        escapes.close()

    def _beside(self, rest: Fields, like: Shape) -> int:
        """Bytes of all that is not symbols: other fields, the step, counts."""
        counts = sum(COUNT_BYTES for shape in self.emits(like).values() if shape.bounded)
        return sum(field.nbytes for field in rest.values()) + 4 + counts


class _Escapes:
    """The levels that have no symbol, in the order in which their places are found."""

    def __init__(self, levels: Array, found: Tables, step: np.float32, size: int) -> None:
        self._levels, self._step, self._at = levels.astype(np.int16), step, 0
        self._shifts = found.centroids[:: found.quantizers, -1] / tables.CENTROID_UNITS
        self._kernel = kernels.fastest(size) if found.escaping else None

    def filled(self, part: Array, rows: RankRows, used: Ints) -> Vector:
        """`part` with its next levels in it. Raises PayloadError."""
        if self._kernel is not None:
            self._at = self._kernel.escaped(
                part, rows.starts, rows.lengths, used, self._shifts, self._step, self._levels, self._at
            )
        if self._at < 0:
            raise PayloadError(Reason.BAD_PAYLOAD, "levels are missing, or 0, where there is no symbol for them")
        return part

    def close(self) -> None:
        """All levels have been met. Raises PayloadError."""
        if self._at != len(self._levels):
            raise PayloadError(Reason.BAD_PAYLOAD, "there are levels that belong nowhere")
