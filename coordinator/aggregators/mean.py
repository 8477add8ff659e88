"""FedAvg (arXiv 1602.05629): the mean of the deltas, weighted by examples, in int64 fixed point."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from coordinator.aggregators.owners import Owners
from coordinator.aggregators.weighing import Weighing
from wire.codecs import kernels
from wire.codecs.chain import Chain
from wire.delta import Layout, Vector
from wire.portion_rules import Rule
from wire.portions import Portion

FRACTION_BITS = 30
"""One unit of the fixed point is 2^-30: finer than float32 resolves any entry above 2^-7, and far below training noise."""
SLAB = 1 << 17
"""Entries converted at a time, so that temporaries stay in cache and memory stays one accumulator."""


class FixedPointSum:
    """Σ weight · round(entry · 2^30) as int64 [layout.size], and Σ weight: of all, or of those whose portion has the entry."""

    def __init__(self, layout: Layout) -> None:
        size = layout.size
        self._layout = layout
        self._total: npt.NDArray[np.int64] = np.zeros(size, np.int64)
        self._weight = 0
        self._owners: Owners | None = None
        slab = min(size, SLAB)
        self._scaled, self._units = np.empty(slab, np.float32), np.empty(slab, np.int32)
        self._weighted = np.empty(slab, np.int64)

    def add(self, vector: Vector, weight: int, portion: Portion | None = None) -> None:
        if portion is not None:
            self._owners = self._owners or Owners(self._layout)
            self._owners.add(portion, weight)
        for start in range(0, len(vector), SLAB):
            self._add(vector[start : start + SLAB], self._total[start : start + SLAB], np.int64(weight))
        self._weight += weight

    def add_coded(self, codec: Chain, payload: bytes | memoryview, layout: Layout, weight: int) -> bool:
        if codec.add(payload, layout, self._total, FRACTION_BITS, weight):
            self._weight += weight
            return True
        parts = codec.parts(payload, layout)
        if parts is not None:
            self.add_parts(parts, weight)
        return parts is not None

    def add_parts(self, parts: Iterable[tuple[slice, Vector]], weight: int) -> None:
        """Add one update whose tensors come one after the other, each with its place: the same sum."""
        kernel = kernels.fastest(len(self._total))
        for place, values in parts:
            table = values.reshape(len(values), -1)
            kernel.add(self._total[place].reshape(table.shape), table, np.float32(2.0**FRACTION_BITS), weight)
        self._weight += weight

    def _add(self, part: Vector, total: npt.NDArray[np.int64], weight: np.int64) -> None:
        """Exact in float32: 2^30 moves the exponent alone, and what is rounded fits 31 bits (LIMIT)."""
        size = len(part)
        scaled, units, weighted = self._scaled[:size], self._units[:size], self._weighted[:size]
        np.multiply(part, np.float32(2.0**FRACTION_BITS), out=scaled)
        np.copyto(units, np.rint(scaled, out=scaled), casting="unsafe")
        np.multiply(units, weight, out=weighted, dtype=np.int64)
        total += weighted

    def mean(self) -> Vector:
        return self._mean() if self._owners is None else self._mean_of_owners(self._owners)

    def _mean_of_owners(self, owners: Owners) -> Vector:
        """An entry that nobody sent does not move."""
        mean = np.zeros(len(self._total), np.float32)
        for (tensor, _), (place, weights) in zip(self._layout.slices(), owners.by_tensor(), strict=True):
            shared = self._total[place].reshape(tensor.shape) / (np.maximum(weights, 1) * 2.0**FRACTION_BITS)
            mean[place] = shared.reshape(-1)
        return mean

    def _mean(self) -> Vector:
        mean = np.empty(len(self._total), np.float32)
        for start in range(0, len(mean), SLAB):
            part = slice(start, start + SLAB)
            mean[part] = self._total[part] / (self._weight * 2.0**FRACTION_BITS)
        return mean


@dataclasses.dataclass(frozen=True)
class Mean(Weighing):
    """Entry by entry. Of devices whose ranks differ, each row counts those that have it (RBLA, arXiv 2408.08699)."""

    id: ClassVar[str] = "mean"
    individual: ClassVar[bool] = False
    bitwise: ClassVar[bool] = True

    def check_layout(self, layout: Layout, portions: Rule | None) -> None:
        """Any will do."""

    def start(self, layout: Layout, adapter: Vector) -> FixedPointSum:
        return FixedPointSum(layout)
