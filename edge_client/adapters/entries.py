"""`entries`: some entries of each weight, drawn once for all devices (the first stage of SLoRA, arXiv 2308.06522)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from edge_client.adapters import Base, Entries, Placement
from edge_client.adapters.low_rank import ALL, PREFIX, check_targets, targeted
from wire.delta import Layout, Tensor, Vector


@dataclasses.dataclass(frozen=True)
class WeightEntries:
    """A part `density` of the entries of each targeted weight is tuned: something is added to it. Which ones follows from `seed`
    alone: one in each of as many equal stretches of the weight, so that positions need not travel.

    On SmolLM2-135M that is 1.06 million numbers at a density of 0.01.
    """

    density: float = 0.01
    targets: tuple[str, ...] | str = ALL
    layers: int | None = None
    seed: int = 0
    id: ClassVar[str] = "entries"

    def __post_init__(self) -> None:
        check_targets(self.targets)
        if not 0.0 < self.density <= 1.0:
            raise ValueError("density must be above 0 and at most 1")
        if self.layers is not None and self.layers < 1:
            raise ValueError("layers must be at least 1")

    def narrowed(self, rank: int) -> WeightEntries:
        return self

    def layout(self, base: Base) -> Layout:
        shapes = targeted(base, self.targets, self.layers)
        return Layout(tuple(Tensor(_name(module), (self._count(*shape),)) for module, shape in shapes.items()))

    def personal(self, base: Base) -> Layout | None:
        return None

    def initial(self, layout: Layout, seed: int, base: Base | None = None) -> Vector:
        return np.zeros(layout.size, np.float32)

    def placement(self, base: Base) -> Placement:
        places = {tensor.name: place for tensor, place in self.layout(base).slices()}
        stream = np.random.Philox(key=self.seed)
        shapes = targeted(base, self.targets, self.layers)
        return Placement(
            entries={
                module: Entries(places[_name(module)], drawn(stream, math.prod(shape), self._count(*shape)))
                for module, shape in shapes.items()
            }
        )

    def _count(self, rows: int, columns: int) -> int:
        return max(1, round(self.density * rows * columns))


def drawn(stream: np.random.Philox, size: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """`count` ascending positions below `size`: one in each of `count` equal stretches, the same on every machine."""
    ends = np.arange(count + 1, dtype=np.int64) * size // count
    lengths = np.diff(ends).astype(np.uint64)
    found: np.ndarray[tuple[int], np.dtype[np.int64]] = ends[:-1] + (stream.random_raw(count) % lengths).astype(
        np.int64
    )
    return found


def _name(module: str) -> str:
    return f"{PREFIX}{module}.entries"
