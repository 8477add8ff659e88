"""The split form of an update: scalars for the tensors below a boundary, a coded delta for those from it on.

A device that computes gradients for the upper layers alone tunes the lower ones by losses (hybrid order). Where it cuts is its
own matter, so the boundary travels: how many of the layout's tensors lie below.
"""

from __future__ import annotations

import dataclasses
import struct

import numpy as np

from wire import scalars
from wire.codecs import State
from wire.codecs.chain import Chain
from wire.delta import Delta, Layout, Vector
from wire.errors import PayloadError, Reason
from wire.scalars import Directions, Scalars, Step, Trajectory

MAGIC = b"ETB1"
HEAD = struct.Struct("<4sII")
"""Magic, tensors below, bytes of the scalars; then the scalars' payload, then the delta's."""


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """`below` tensors of `layout` were tuned by `scalars`, the others by `delta`, a Delta of `layout.above(below)`.

    `scalars` speak of the first entries of the run's directions: those of `layout.below(below)`.
    """

    layout: Layout
    below: int
    scalars: Scalars
    delta: Delta

    def __post_init__(self) -> None:
        if self.delta.layout != self.layout.above(self.below):
            raise ValueError("the delta must be of the tensors above the boundary")

    def encode(self, codec: Chain, state: State) -> tuple[bytes, State]:
        """The payload, and the codec's state to keep once it is accepted."""
        first = self.scalars.encode(self.layout.below(self.below))
        second, following = codec.encode(self.delta, state)
        return HEAD.pack(MAGIC, self.below, len(first)) + first + second, following

    def vector(self, key: int, version: int) -> Vector:
        """What the update adds to the adapter of release `version`, float32 [layout.size], its directions drawn by `key`."""
        lower = self.layout.below(self.below)
        start = Trajectory.start(self.scalars.directions, lower, np.zeros(lower.size, np.float32), version)
        return np.concatenate([start.delta(Step(((key, self.scalars.units),))), self.delta.vector])


def is_split(payload: bytes | memoryview) -> bool:
    """Whether a payload is of this form, by its first bytes."""
    return bytes(payload[: len(MAGIC)]) == MAGIC


def max_bytes(codec: Chain, directions: Directions, layout: Layout) -> int:
    """The longest payload."""
    return HEAD.size + directions.max_bytes() + codec.max_bytes(layout)


def decode(payload: bytes | memoryview, codec: Chain, directions: Directions, layout: Layout) -> Split:
    """What a device meant. Total: returns or raises PayloadError."""
    if len(payload) < HEAD.size or not is_split(payload):
        raise PayloadError(Reason.BAD_PAYLOAD, "not a split update: the header is missing")
    _, below, length = HEAD.unpack_from(payload)
    if not 0 < below < len(layout.tensors):
        raise PayloadError(Reason.WRONG_LAYOUT, f"a boundary after {below} of {len(layout.tensors)} tensors")
    first, second = payload[HEAD.size : HEAD.size + length], payload[HEAD.size + length :]
    lower = scalars.decode(first, directions, layout.below(below))
    return Split(layout, below, lower, codec.decode(second, layout.above(below)))
