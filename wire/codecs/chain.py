"""Chain: a whole codec, from Delta to payload bytes and back. The bytes are described in docs/wire-format.md."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from wire import spec
from wire.codecs import Shape, Stage, State, rank_rows, series, vector_shape
from wire.codecs.compositions import COMPOSITIONS
from wire.codecs.kernels import Ints
from wire.delta import Delta, Layout, Tensor, Vector
from wire.errors import PayloadError, Reason, SpecError
from wire.spec import Plain

MAGIC = b"ETU1"
NAME_BYTES = 8
"""Bytes of a digest that a header carries: enough to tell mistakes, which is all it is for."""
HEADER_BYTES = len(MAGIC) + 2 * NAME_BYTES

SHORTEST_TARGET, LONGEST_TARGET = 0.001, 12.0
"""Bits a parameter that a stage can be asked for."""
_SMALL = Layout((Tensor("any", (100,)),))


@dataclasses.dataclass(frozen=True)
class Chain:
    """Fields stages, one `pack`, byte stages. Raises SpecError for any other order."""

    stages: tuple[Stage, ...]
    known_as: str | None = None

    def __post_init__(self) -> None:
        kinds = [stage.kind for stage in self.stages]
        if kinds.count("pack") != 1 or kinds != sorted(kinds, key=["fields", "pack", "bytes"].index):
            raise SpecError(f"codec: expected field stages, one pack, then byte stages; got {self}")
        try:
            self.max_bytes(_SMALL)
        except ValueError as error:
            raise SpecError(f"codec: {self}: {error}") from error

    def __str__(self) -> str:
        return f"chain({', '.join(stage.id for stage in self.stages)})"

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of the stages' plain form; of those of the chain that this one is `rated` from."""
        return self.known_as or spec.digest([spec.plain(stage) for stage in self.stages])

    def rated(self, share: float) -> Chain:
        """This chain with `share` times its target: an encoder of other lengths, whose payloads this chain decodes. A chain
        without a target is itself at every rate."""
        tables = [spec.plain(stage) for stage in self.stages]
        rated = [_rated(table, share) for table in tables]
        return self if rated == tables else Chain(series.build(rated, "codec"), self.digest)

    @property
    def target_bits(self) -> float:
        """The most bits a parameter that one of its stages is asked for; 0 where none has such a target."""
        return max(_target_bits(spec.plain(stage) for stage in self.stages), default=0.0)

    def max_bytes(self, layout: Layout) -> int:
        """The longest payload that an encoder can write for `layout`."""
        longest: int = series.shapes(self.stages, shape(layout))[-1]
        return HEADER_BYTES + longest

    def init(self, layout: Layout) -> State:
        """The state before the first update."""
        return series.init(self.stages, shape(layout))

    def encode(self, delta: Delta, state: State) -> tuple[bytes, State]:
        """The payload, and the state to keep once it is accepted. Raises ValueError for a delta that is not finite."""
        if not np.isfinite([delta.vector.max(initial=0), delta.vector.min(initial=0)]).all():
            raise ValueError("a delta must be finite")
        body, following = series.encode(self.stages, {"values": delta.vector}, state, shape(delta.layout))
        return self._header(delta.layout) + body, following

    def decode(self, payload: bytes | memoryview, layout: Layout) -> Delta:
        """What the encoder meant. Total: raises PayloadError for every other byte string."""
        self._check_header(payload, layout)
        with np.errstate(all="ignore"):  # what is not finite is refused below
            fields = series.decode(self.stages, payload[HEADER_BYTES:], shape(layout))
        vector = np.ascontiguousarray(fields["values"], np.float32)
        if not np.isfinite(vector).all():
            raise PayloadError(Reason.NOT_FINITE, "the update has an entry that is not a finite number")
        return Delta(layout, vector)

    def parts(self, payload: bytes | memoryview, layout: Layout) -> Iterator[tuple[slice, Vector]] | None:
        """What `decode` gives, tensor after tensor, each with its place and in its shape: a fold of it stays in cache.

        None for a codec that decodes in one piece only. Raises PayloadError, as late as at the end.
        """
        self._check_header(payload, layout)
        found = series.parts(self.stages, payload[HEADER_BYTES:], shape(layout))
        return None if found is None else _placed(found, layout)

    def add(self, payload: bytes | memoryview, layout: Layout, total: Ints, fraction_bits: int, weight: int) -> bool:
        """Add weight · round(entry · 2^fraction_bits) of what `decode` gives to `total`, int64 [size], with no vector in between.

        False, and nothing added, for a codec that has no such loop. Raises PayloadError, as late as at the end.
        """
        self._check_header(payload, layout)
        body = memoryview(payload)[HEADER_BYTES:]
        return series.add(self.stages, body, shape(layout), total, fraction_bits, weight)

    def _header(self, layout: Layout) -> bytes:
        return MAGIC + b"".join(bytes.fromhex(name)[:NAME_BYTES] for name in (layout.digest, self.digest))

    def _check_header(self, payload: bytes | memoryview, layout: Layout) -> None:
        found, wanted = payload[:HEADER_BYTES], self._header(layout)
        first, second = len(MAGIC), len(MAGIC) + NAME_BYTES
        if len(found) < HEADER_BYTES or found[:first] != MAGIC:
            raise PayloadError(Reason.BAD_PAYLOAD, "not an update: the header is missing")
        if found[first:second] != wanted[first:second]:
            raise PayloadError(Reason.WRONG_LAYOUT, "the update was encoded for another layout")
        if found[second:] != wanted[second:]:
            raise PayloadError(Reason.WRONG_CODEC, f"the update was encoded by another codec than {self}")


def _rated(stage: Plain, share: float) -> Plain:
    """A stage's table with its target times `share`, and so those of the stages that it wraps."""
    changed = dict(stage)
    if changed.get("target_bytes") is not None:
        changed["target_bytes"] = max(1, round(changed["target_bytes"] * share))
    if "target_bits" in changed:
        changed["target_bits"] = min(LONGEST_TARGET, max(SHORTEST_TARGET, changed["target_bits"] * share))
    if "inner" in changed:
        changed["inner"] = [_rated(inner, share) for inner in changed["inner"]]
    return changed


def _target_bits(stages: Iterable[Plain]) -> Iterator[float]:
    for stage in stages:
        if "target_bits" in stage and stage.get("target_bytes") is None:
            yield stage["target_bits"]
        yield from _target_bits(stage.get("inner", ()))


def _placed(parts: Iterator[Vector], layout: Layout) -> Iterator[tuple[slice, Vector]]:
    with np.errstate(all="ignore"):
        for (tensor, place), part in zip(layout.slices(), parts, strict=True):
            if not np.isfinite(part).all():
                raise PayloadError(Reason.NOT_FINITE, "the update has an entry that is not a finite number")
            yield place, rank_rows.shaped(part, tensor)


def shape(layout: Layout) -> Shape:
    """What the first stage of a chain works on."""
    return vector_shape(layout.size, layout.tensors)


def codec(described: str | Sequence[Plain]) -> Chain:
    """A codec by its name in COMPOSITIONS or by its stages' tables. Raises SpecError."""
    if isinstance(described, str):
        if described not in COMPOSITIONS:
            raise SpecError(f"codec: unknown name {described!r}; choose one of {', '.join(sorted(COMPOSITIONS))}")
        described = COMPOSITIONS[described]
    return Chain(series.build(described, "codec"))
