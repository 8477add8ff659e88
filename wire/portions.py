"""Portions: the part of a layout that a device tunes and sends in a round, and the form of an update that is one."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

import numpy as np

from wire.codecs import State
from wire.codecs.chain import Chain
from wire.delta import RANK_AXES, Delta, Layout, Tensor, Vector
from wire.errors import PayloadError, Reason

MAGIC = b"ETP1"
HEAD = struct.Struct("<4sH")
"""Magic and the rank (0: whole); then a bit for each tensor of the layout, the lowest first; then the payload of the part."""
MAX_RANK = (1 << 16) - 1


@dataclasses.dataclass(frozen=True)
class Portion:
    """The tensors of a layout at the places `chosen`, and of each at most its first `rank` entries along its rank axes.

    Raises ValueError for no tensor at all, and for places that do not ascend.
    """

    chosen: tuple[int, ...]
    rank: int | None = None

    def __post_init__(self) -> None:
        if (
            not self.chosen
            or self.chosen[0] < 0
            or any(a >= b for a, b in zip(self.chosen, self.chosen[1:], strict=False))
        ):
            raise ValueError("a portion has one tensor or more, each once and in the layout's order")
        if self.rank is not None and not 1 <= self.rank <= MAX_RANK:
            raise ValueError(f"the rank of a portion lies between 1 and {MAX_RANK}")

    def layout(self, whole: Layout) -> Layout:
        """The chosen tensors as far as they go, under their own names. Raises ValueError for places that `whole` has not."""
        return Layout(tuple(dataclasses.replace(t, shape=self._shape(t)) for t, _ in self._places(whole)))

    def take(self, vector: Vector, whole: Layout) -> Vector:
        """The portion's entries of `vector`, float32 [whole.size], in the order of `layout(whole)`."""
        return np.concatenate([vector[p].reshape(t.shape)[self._cut(t)].reshape(-1) for t, p in self._places(whole)])

    def put(self, part: Vector, whole: Layout) -> Vector:
        """`part`, float32 [layout(whole).size], at its places among zeros, float32 [whole.size]."""
        vector, inner = np.zeros(whole.size, np.float32), self.layout(whole)
        for (tensor, place), (small, at) in zip(self._places(whole), inner.slices(), strict=True):
            vector[place].reshape(tensor.shape)[self._cut(tensor)] = part[at].reshape(small.shape)
        return vector

    def within(self, most: Portion) -> bool:
        """Whether nothing of it lies outside of `most`."""
        ranks = (self.rank or MAX_RANK + 1) <= (most.rank or MAX_RANK + 1)
        return ranks and set(self.chosen) <= set(most.chosen)

    def _places(self, whole: Layout) -> Iterator[tuple[Tensor, slice]]:
        every = list(whole.slices())
        if self.chosen[-1] >= len(every):
            raise ValueError(f"tensor {self.chosen[-1]} of a layout of {len(every)}")
        return (every[number] for number in self.chosen)

    def _shape(self, tensor: Tensor) -> tuple[int, ...]:
        axes = RANK_AXES.get(tensor.role, ())
        return tuple(min(n, self.rank or n) if axis in axes else n for axis, n in enumerate(tensor.shape))

    def _cut(self, tensor: Tensor) -> tuple[slice, ...]:
        return tuple(slice(0, n) for n in self._shape(tensor))


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """An update of a portion of `layout`: `delta` is a Delta of `portion.layout(layout)`."""

    layout: Layout
    portion: Portion
    delta: Delta

    def __post_init__(self) -> None:
        if self.delta.layout != self.portion.layout(self.layout):
            raise ValueError("the delta must be of the portion's layout")

    @property
    def vector(self) -> Vector:
        """What the update adds to the adapter, float32 [layout.size]."""
        return self.portion.put(self.delta.vector, self.layout)

    def encode(self, codec: Chain, state: State) -> tuple[bytes, State]:
        """The payload, and the codec's state to keep once it is accepted."""
        body, following = codec.encode(self.delta, state)
        return _head(self.portion, self.layout) + body, following


def _head(portion: Portion, layout: Layout) -> bytes:
    bits = np.zeros(len(layout.tensors), np.uint8)
    bits[list(portion.chosen)] = 1
    return HEAD.pack(MAGIC, portion.rank or 0) + np.packbits(bits, bitorder="little").tobytes()


def is_part(payload: bytes | memoryview) -> bool:
    """Whether a payload is of this form, by its first bytes."""
    return bytes(payload[: len(MAGIC)]) == MAGIC


def max_bytes(codec: Chain, layout: Layout) -> int:
    """The longest payload."""
    return HEAD.size + (len(layout.tensors) + 7) // 8 + codec.max_bytes(layout)


def decode(payload: bytes | memoryview, codec: Chain, layout: Layout) -> Part:
    """What a device meant. Total: returns or raises PayloadError."""
    start = HEAD.size + (len(layout.tensors) + 7) // 8
    if len(payload) < start or not is_part(payload):
        raise PayloadError(Reason.BAD_PAYLOAD, "not a part of an update: the header is missing")
    rank = HEAD.unpack_from(payload)[1] or None
    bits = np.unpackbits(np.frombuffer(payload[HEAD.size : start], np.uint8), bitorder="little")
    if bits[len(layout.tensors) :].any() or not bits.any():
        raise PayloadError(Reason.BAD_PAYLOAD, "a part of tensors that the layout does not have, or of none")
    portion = Portion(tuple(np.flatnonzero(bits).tolist()), rank)
    return Part(layout, portion, codec.decode(payload[start:], portion.layout(layout)))
