"""Top-k stage: only the entries of largest magnitude (arXiv 1704.05021), with their positions."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import numpy as np

from wire.codecs import Array, Fields, FieldShape, Shape, State, expect
from wire.errors import PayloadError, Reason


@dataclasses.dataclass(frozen=True)
class TopK:
    """`values` [n] -> `values` [k] and `positions` uint32 [k], ascending; k = ceil(fraction * n). The rest is zero.

    Of entries of one magnitude the earlier wins, so that every machine chooses the same.
    """

    fraction: float
    id: ClassVar[str] = "top_k"
    kind: ClassVar[Literal["fields"]] = "fields"

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0:
            raise ValueError("fraction must be above 0 and at most 1")

    def kept(self, length: int) -> int:
        """How many of `length` entries are sent."""
        return kept(self.fraction, length)

    def emits(self, like: Shape) -> Shape:
        length = expect(like, "values", "float32").length
        if len(like) > 1:
            raise ValueError("top_k must be the first stage that makes fields")
        kept = self.kept(length)
        return {"values": FieldShape("float32", kept), "positions": FieldShape("uint32", kept, below=length)}

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        values = x["values"]
        positions = largest(np.abs(values), self.kept(len(values)))
        return {"values": values[positions], "positions": positions.astype(np.uint32)}, {}

    def decode(self, y: Fields, like: Shape) -> Fields:
        length, positions = like["values"].length, y["positions"].astype(np.int64)
        if positions[-1] >= length or (np.diff(positions) <= 0).any():
            raise PayloadError(Reason.BAD_PAYLOAD, "positions are not ascending or lie beyond the layout")
        values = np.zeros(length, np.float32)
        values[positions] = y["values"]
        return {"values": values}


def kept(fraction: float, length: int) -> int:
    """How many entries a fraction of `length` is: at least one."""
    return min(length, max(1, math.ceil(fraction * length)))


def largest(magnitudes: Array, count: int) -> Array:
    """Positions, ascending, of the `count` largest entries; the earlier of equals.

    >>> largest(np.array([1.0, 3.0, 2.0, 2.0]), 2).tolist()
    [1, 2]
    """
    threshold = np.partition(magnitudes, len(magnitudes) - count)[len(magnitudes) - count]
    above, equal = np.flatnonzero(magnitudes > threshold), np.flatnonzero(magnitudes == threshold)
    return np.sort(np.concatenate([above, equal[: count - len(above)]]))
