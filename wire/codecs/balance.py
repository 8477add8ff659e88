"""Balance stage: larger steps for A than for B, since what devices compute with is B A and no entry by itself.

An error of B is multiplied by A, one of A by B. B begins at zero and stays small beside A for as long as training is short,
so that equal steps spend on A what B could use.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

import numpy as np

from wire.codecs import Fields, Shape, State, expect, rank_rows
from wire.delta import Vector


@dataclasses.dataclass(frozen=True)
class Balance:
    """`values` float32 [n] -> `values`, those of every `lora_A` divided by 2^`halvings`, which rounds nothing: a step of what
    comes after is so much larger for them."""

    halvings: int = 1
    id: ClassVar[str] = "balance"
    kind: ClassVar[Literal["fields"]] = "fields"

    def __post_init__(self) -> None:
        if not 1 <= self.halvings <= 8:
            raise ValueError("halvings must lie between 1 and 8")

    def emits(self, like: Shape) -> Shape:
        expect(like, "values", "float32")
        if "normals" in like:
            raise ValueError("must come before rank_rotate, after which all factors look alike")
        return like

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        return {**x, "values": self._times(x["values"], 2.0**-self.halvings, like)}, {}

    def decode(self, y: Fields, like: Shape) -> Fields:
        return {**y, "values": self._times(y["values"], 2.0**self.halvings, like)}

    def turned(self, y: Fields, like: Shape, parts: Iterable[Vector]) -> Iterator[Vector]:
        """As `decode`, tensor after tensor."""
        factor = np.float32(2.0**self.halvings)
        for tensor, part in zip(like["values"].tensors, parts, strict=True):
            yield part * factor if tensor.role == "lora_A" else part

    def _times(self, values: Vector, factor: float, like: Shape) -> Vector:
        changed = np.array(values, np.float32)
        for tensor, place in rank_rows.places(like["values"].tensors):
            if tensor.role == "lora_A":
                changed[place] *= np.float32(factor)
        return changed
