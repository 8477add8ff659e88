"""How much of an update a device sends as its loss falls: the largest entries of A and of B, fewer the more it has learned."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from wire.codecs.top_k import kept, largest
from wire.delta import Layout, Vector


@dataclasses.dataclass(frozen=True)
class Density:
    """least + (most - least) · exp(-speed · d) of A's entries, and of B's by themselves, where d is how far in nats a token the
    device's held-out loss has fallen (EcoLoRA, arXiv 2506.02001). Tensors of other roles go with B.
    """

    most: float = 0.95
    least_a: float = 0.6
    least_b: float = 0.5
    speed_a: float = 1.0
    speed_b: float = 2.0

    def __post_init__(self) -> None:
        if not (0 < self.least_a <= self.most and 0 < self.least_b <= self.most <= 1):
            raise ValueError("expected least_a and least_b above 0, neither above most, and most at most 1")
        if min(self.speed_a, self.speed_b) < 0:
            raise ValueError("speed_a and speed_b must not be negative")

    def of(self, role: str, fallen: float) -> float:
        """The share of the entries of a role's tensors; a loss that has risen counts as one that stayed."""
        least, speed = (self.least_a, self.speed_a) if role == "lora_A" else (self.least_b, self.speed_b)
        return least + (self.most - least) * math.exp(-speed * max(0.0, fallen))

    def thinned(self, vector: Vector, layout: Layout, fallen: float) -> Vector:
        """`vector`, float32 [layout.size], with zeros for all but the largest entries of each role's tensors together."""
        found = np.zeros_like(vector)
        for role in dict.fromkeys(tensor.role for tensor in layout.tensors):
            mine = np.concatenate([np.arange(p.start, p.stop) for t, p in layout.slices() if t.role == role])
            some = mine[largest(np.abs(vector[mine]), kept(self.of(role, fallen), len(mine)))]
            found[some] = vector[some]
        return found
