"""Codecs: frozen rows of one algebra, composed with `chain`. Read this first.

A codec is a *stage*. Stages pass `Fields`, an ordered table of one-dimensional arrays, and a chain has exactly one
stage that turns fields into bytes (`pack`); what stands after it works on bytes. Encoding runs left to right, decoding
right to left. Only a client encodes, and only encoding has state (error feedback); decoding is stateless and total: it
returns, or raises PayloadError, whatever the bytes are.

    chain(error_feedback(top_k(0.25), int4), rice, pack)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Protocol

import numpy.typing as npt

from wire.delta import Tensor

Array = npt.NDArray[Any]
Fields = dict[str, Array]
State = dict[str, Array]
"""A codec's memory on the client: named arrays, saved by the client only after the receipt. `{}` when there is none."""


@dataclasses.dataclass(frozen=True)
class FieldShape:
    """What a stage emits under one name: `length` entries of `dtype`, or at most `length` if `bounded`.

    `below` is the exclusive upper limit of the entries, where one is known (positions); `tensors` says whose entries they
    are, one tensor after the other, where they are those of whole tensors.
    """

    dtype: str
    length: int
    bounded: bool = False
    below: int = 0
    tensors: tuple[Tensor, ...] = ()


Shape = dict[str, FieldShape]
"""The static form of Fields, known from the layout before the first byte arrives."""


def vector_shape(size: int, tensors: tuple[Tensor, ...] = ()) -> Shape:
    """The shape of a delta: one float32 field `values` of `size` entries, those of `tensors`."""
    return {"values": FieldShape("float32", size, tensors=tensors)}


def expect(like: Shape, name: str, dtype: str) -> FieldShape:
    """The field that a stage works on. Raises ValueError if the stages before do not give it."""
    if name not in like or like[name].dtype != dtype:
        raise ValueError(f"needs a {dtype} field {name!r} from the stages before it, which give {sorted(like)}")
    return like[name]


class Stage(Protocol):
    """A row of `STAGES`. `kind` says which side of `pack` it stands on."""

    id: str
    kind: Literal["fields", "pack", "bytes"]

    def emits(self, like: Any) -> Any:
        """The static shape of the output for an input of shape `like` (bytes stages: the longest output in bytes).

        Raises ValueError for an input this stage cannot work on.
        """

    def init(self, like: Any) -> State:
        """The state before the first encode."""

    def encode(self, x: Any, state: State, like: Any) -> tuple[Any, State]:
        """The coded form of `x`, of shape `like`, and the state to keep if the coordinator accepts it.

        Changes neither `x` nor `state`.
        """

    def decode(self, y: Any, like: Any) -> Any:
        """The inverse, given the shape `like` that was encoded. Total: returns or raises PayloadError."""


STAGES: Mapping[str, str] = {
    "float32": "wire.codecs.floats:Float32",
    "float16": "wire.codecs.floats:Float16",
    "blockwise": "wire.codecs.blockwise:Blockwise",
    "entropy": "wire.codecs.entropy:Entropy",
    "normal_float": "wire.codecs.normal_float:NormalFloat",
    "qsgd": "wire.codecs.rounding:Qsgd",
    "dither": "wire.codecs.rounding:Dither",
    "ternary": "wire.codecs.rounding:Ternary",
    "sign": "wire.codecs.signs:Sign",
    "eden": "wire.codecs.signs:Eden",
    "chunk_top_k": "wire.codecs.sparse:ChunkTopK",
    "random_k": "wire.codecs.sparse:RandomK",
    "count_sketch": "wire.codecs.sparse:CountSketch",
    "projection": "wire.codecs.projection:Projection",
    "top_k": "wire.codecs.top_k:TopK",
    "balance": "wire.codecs.balance:Balance",
    "rank_rotate": "wire.codecs.rank_rotate:RankRotate",
    "rice": "wire.codecs.rice:Rice",
    "ecsq": "wire.codecs.ecsq:Ecsq",
    "error_feedback": "wire.codecs.error_feedback:ErrorFeedback",
    "pack": "wire.codecs.pack:Pack",
    "zstd": "wire.codecs.zstd:Zstd",
}
