"""Float stages: the vector as it is, or rounded to half precision."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from wire.codecs import Array, Fields, Shape, State, expect


@dataclasses.dataclass(frozen=True)
class Float32:
    """`values` unchanged: the codec that every other one is compared with."""

    id: ClassVar[str] = "float32"
    kind: ClassVar[Literal["fields"]] = "fields"

    def emits(self, like: Shape) -> Shape:
        return like

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        return x, {}

    def decode(self, y: Fields, like: Shape) -> Fields:
        return y


@dataclasses.dataclass(frozen=True)
class Float16:
    """`values` as IEEE half precision, rounded to nearest even; what is too large for it becomes the largest half."""

    id: ClassVar[str] = "float16"
    kind: ClassVar[Literal["fields"]] = "fields"

    def emits(self, like: Shape) -> Shape:
        return like | {"values": dataclasses.replace(expect(like, "values", "float32"), dtype="float16")}

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        return x | {"values": half(x["values"])}, {}

    def decode(self, y: Fields, like: Shape) -> Fields:
        return y | {"values": y["values"].astype(np.float32)}


def half(values: Array) -> Array:
    """Half precision without infinities."""
    largest = np.finfo(np.float16).max
    return np.clip(values, -largest, largest).astype(np.float16)
