"""Projection stage: what an update measures along directions that a seed gives (Ferret, arXiv 2409.06277)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import numpy as np

from wire.codecs import Array, Fields, FieldShape, Shape, State, chance, expect
from wire.codecs.blockwise import blocks, check_block
from wire.codecs.top_k import kept


@dataclasses.dataclass(frozen=True)
class Projection:
    """`values` [n] -> `values` [blocks · K]: of every block of d entries its *multiples* of K directions, `fraction` · d.

    A direction's entries are normal numbers between ±1/√d, of variance ρ. The multiples Vx / (ρK) add up to an unbiased
    estimate, as in the paper, with an error of d/K times the energy; by K / (K + d) of them the error is least, d / (K + d) of
    the energy. All blocks and devices have the same directions and as many: linear, sums of coded updates decode to sums. (The
    paper's devices give a block more directions where its norm is larger, each as its own norms are, and so cannot add.)
    """

    fraction: float
    block: int = 1024
    unbiased: bool = False
    seed: int = 0
    id: ClassVar[str] = "projection"
    kind: ClassVar[Literal["fields"]] = "fields"

    def __post_init__(self) -> None:
        check_block(self.block, 4096)
        if not 0.0 < self.fraction <= 1.0 or not 0 <= self.seed < 1 << 64:
            raise ValueError("fraction must be above 0 and at most 1, seed below 2^64")

    def emits(self, like: Shape) -> Shape:
        many = -(-expect(like, "values", "float32").length // self.block)
        return {"values": FieldShape("float32", many * kept(self.fraction, self.block))}

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        directions = self._directions()
        columns = np.ascontiguousarray(blocks(x["values"], self.block).T)
        return {"values": (_combined(columns, directions.T) * self._factor()).T.reshape(-1)}, {}

    def decode(self, y: Fields, like: Shape) -> Fields:
        directions = self._directions()
        multiples = np.ascontiguousarray(y["values"].astype(np.float32).reshape(-1, len(directions)).T)
        return {"values": _combined(multiples, directions).T.reshape(-1)[: like["values"].length]}

    def _factor(self) -> np.float32:
        """1 / (ρK), or K / (K + d) of it."""
        count = kept(self.fraction, self.block)
        variance = (1 - 2 / (15 * self.block)) / (3 * self.block)
        return np.float32(1 / (variance * (count if self.unbiased else count + self.block)))

    def _directions(self) -> Array:
        """float32 [K, d]. Of normal numbers between ±a the share ½ + ½ t lies below a · (t - (t - t³) a² / 6), but for a⁵ / 100:
        so t, uniform in ±1, gives one in products alone, the same bits everywhere."""
        count = kept(self.fraction, self.block)
        uniform = 2.0 * chance.uniform(self.seed, count * self.block).astype(np.float64) - (1 - 2.0**-24)
        bent = uniform - (uniform - uniform * uniform * uniform) / (6 * self.block)
        return (bent / math.sqrt(self.block)).astype(np.float32).reshape(count, self.block)


def _combined(several: Array, factors: Array) -> Array:
    """Σ several[i] · factors[i, j] as row j, float32 [columns of `factors`, …]; sums run from the first on, so that they are the
    same everywhere."""
    total = np.zeros((factors.shape[1], several.shape[1]), np.float32)
    for some, mine in zip(several, factors, strict=True):
        total += mine[:, None] * some
    return total
