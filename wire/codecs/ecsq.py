"""Ecsq stage: entropy-coded scalar quantization with one step for all tensors, near the rate-distortion bound at every rate.

One step is reverse water-filling: where there is little energy, almost nothing is sent. Rank rows of about one scale share a
table of frequencies; levels are reconstructed at the centroids of their cells; `rans` codes them in as many bits as they inform.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np

from wire.codecs import Array, Fields, FieldShape, Shape, State, expect, kernels, rank_rows, rans, rate, tables
from wire.codecs.kernels import SYMBOLS, UNITS, Ints, Words
from wire.codecs.pack import COUNT_BYTES
from wire.codecs.rank_rows import RankRows
from wire.codecs.rate import Plan
from wire.codecs.tables import Tables
from wire.delta import Vector
from wire.errors import PayloadError, Reason

CLOSE = 0.98
"""An update has this part of its target at least, if there is so much to tell."""
ATTEMPTS = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Coded:
    """Quantized rows: their symbols, the levels that have none, each row's table (-1: left out), and what all of it takes."""

    step: np.float32
    symbols: Array
    escapes: Array
    used: Ints
    tables: Tables
    classes: Words
    bits: float


@dataclasses.dataclass(frozen=True)
class Ecsq:
    """`values` float32 [n] -> `step` float32 [1], `tables` and `classes`, `escapes` and `words`.

    The update has `target_bits` a parameter, or `target_bytes`, and up to 2 % less, with everything that the stages before this
    one send beside the values.
    """

    target_bits: float = 0.2
    target_bytes: int | None = None
    id: ClassVar[str] = "ecsq"
    kind: ClassVar[Literal["fields"]] = "fields"

    def __post_init__(self) -> None:
        if not 0.001 <= self.target_bits <= 12 or (self.target_bytes is not None and self.target_bytes < 1):
            raise ValueError("target_bits must lie between 0.001 and 12, target_bytes be positive")

    def emits(self, like: Shape) -> Shape:
        values = expect(like, "values", "float32")
        rows, size = rank_rows.of(values), values.length
        rest = {name: shape for name, shape in like.items() if name != "values"}
        return {
            **rest,
            "step": FieldShape("float32", 1),
            "tables": FieldShape("uint8", tables.LONGEST, bounded=True),
            "classes": FieldShape("uint16", len(rows) + 2, bounded=True),
            "escapes": FieldShape("int16", _most_escapes(size), bounded=True),
            "words": FieldShape("uint16", size + 2 * rans.lanes(size), bounded=True),
        }

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        values = rank_rows.gathered(x["values"], like["values"].tensors)
        rows, rest = rank_rows.of(like["values"]), {name: field for name, field in x.items() if name != "values"}
        bits = 8 * self.target_bytes if self.target_bytes is not None else self.target_bits * len(values)
        coded = quantized(values, rows, bits - 8 * self._beside(rest, like))
        return {**rest, **_fields(coded, rows, len(values))}, {}

    def decode(self, y: Fields, like: Shape) -> Fields:
        parts = list(self.parts(y, like))
        values = rank_rows.scattered(np.concatenate(parts), like["values"].tensors)
        return {"values": values, **{name: field for name, field in y.items() if name in like}}

    def parts(self, y: Fields, like: Shape, parts: None = None) -> Iterator[Vector]:
        """The values in row order, tensor after tensor. Raises PayloadError."""
        size, rows, step = like["values"].length, rank_rows.of(like["values"]), y["step"][0]
        if not 0 <= step < np.inf:
            raise PayloadError(Reason.BAD_PAYLOAD, "the step is negative or no finite number")
        found = tables.parse(y["tables"])
        used, values, lookup = (
            found.rows(y["classes"], len(rows), size),
            found.values(step),
            rans.lookup(found.frequencies),
        )
        if (used >= len(values)).any():
            raise PayloadError(Reason.BAD_PAYLOAD, "a row has a table that is not there")
        reader, escapes = (
            rans.Reader(y["words"], rans.lanes(size), int(rows.lengths.max()), size),
            _Escapes(y["escapes"]),
        )
        for mine, part_rows in rank_rows.by_tensor(like["values"]):
            part = reader.read(part_rows, used[mine], lookup, values)
            yield escapes.filled(part, part_rows.lengths, used[mine], found, step)
        reader.close()
        escapes.close()

    def _beside(self, rest: Fields, like: Shape) -> int:
        """Bytes of all that is not symbols: other fields, the step, counts."""
        counts = sum(COUNT_BYTES for shape in self.emits(like).values() if shape.bounded)
        return sum(field.nbytes for field in rest.values()) + 4 + counts


def _most_escapes(size: int) -> int:
    return size // 16 + 1


class _Escapes:
    """The levels that have no symbol, in the order in which their places are found."""

    def __init__(self, levels: Array) -> None:
        self._levels = levels

    def filled(self, part: Array, lengths: Ints, used: Ints, found: Tables, step: np.float32) -> Vector:
        """`part` with its next levels in it."""
        if not len(self._levels) and not found.escaping:
            return part
        places = np.flatnonzero(np.isnan(part))
        levels, self._levels = self._levels[: len(places)].astype(np.int64), self._levels[len(places) :]
        if len(levels) < len(places) or not levels.all():
            raise PayloadError(Reason.BAD_PAYLOAD, "levels are missing, or 0, where there is no symbol for them")
        shift = found.centroids[used[np.searchsorted(np.cumsum(lengths), places, side="right")], -1]
        magnitudes = np.abs(levels) + shift / tables.CENTROID_UNITS
        part[places] = step * np.copysign(magnitudes, levels).astype(np.float32)
        return part

    def close(self) -> None:
        if len(self._levels):
            raise PayloadError(Reason.BAD_PAYLOAD, "there are levels that belong nowhere")


def quantized(values: Vector, rows: RankRows, budget: float) -> Coded:
    """`values` in row order in at most `budget` bits, if so few are possible at all."""
    kernel = kernels.fastest(len(values))
    largest = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
    nothing = _nothing(rows, len(values))
    if largest < 2.0**-100:
        return nothing
    survey = rate.survey(values, largest, rows, kernel)
    finest, goal, best = largest * 2.0**-15, budget * (1 + CLOSE) / 2, nothing
    estimate, wanted = rate.Estimate(survey), goal
    for _ in range(ATTEMPTS):
        fine, coarse = rate.solve(estimate, wanted, finest)
        jumps = coarse.total < CLOSE * fine.total
        classes = survey.fitted(fine, wanted, rows) if jumps else survey.chosen(fine)
        coded = _coded(values, rows, classes, fine, kernel)
        if len(coded.escapes) > _most_escapes(len(values)):
            finest = 2 * fine.step
            continue
        if best.bits < coded.bits <= budget:
            best = coded
        if CLOSE * budget <= coded.bits <= budget or fine is coarse:
            break
        wanted *= goal / coded.bits if coded.bits else 1.0
        if jumps and coded.bits < budget:
            survey = survey.without(classes < 0, rows)  # what is too little for one more row goes into a finer step
            estimate, wanted = rate.Estimate(survey), goal
    return best


def _nothing(rows: RankRows, size: int) -> Coded:
    """Every row left out."""
    used, none = np.full(len(rows), -1), np.zeros(0, np.int64)
    found = tables.of(none.reshape(0, SYMBOLS), none.reshape(0, 3), used)
    classes, escapes = tables.coded_rows(found, used, size), np.zeros(0, np.int16)
    return Coded(np.float32(0), np.zeros(size, np.uint8), escapes, used, found, classes, 0.0)


def _coded(values: Vector, rows: RankRows, classes: Ints, plan: Plan, kernel: object) -> Coded:
    known, used = np.unique(np.append(classes, -1), return_inverse=True)
    known, used = known[1:], used[:-1] - 1
    offsets = UNITS - np.rint(plan.thresholds[known] * UNITS).astype(np.int64)
    step = np.float32(plan.step)
    inverse = np.float32(UNITS) / step
    symbols, escapes, counts, residuals = kernel.quantize(  # type: ignore[attr-defined]
        values, rows.starts, rows.lengths, used, inverse, offsets
    )
    found = tables.of(counts, residuals, used)
    coded = tables.coded_rows(found, used, len(values))
    sent = sum(rans.cost(f, c) for f, c in zip(found.frequencies, counts, strict=True))
    beside = 8 * len(found.to_bytes()) + 16 * (len(coded) + len(escapes)) + 32 * rans.lanes(len(values))
    return Coded(step, symbols, escapes, used, found, coded, sent + beside)


def _fields(coded: Coded, rows: RankRows, size: int) -> Fields:
    words = kernels.fastest(size).encode(
        coded.symbols, rows.starts, rows.lengths, coded.used, coded.tables.frequencies, rans.lanes(size)
    )
    return {
        "step": np.array([coded.step], np.float32),
        "tables": coded.tables.to_bytes(),
        "classes": coded.classes,
        "escapes": coded.escapes,
        "words": words,
    }
