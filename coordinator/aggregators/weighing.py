"""What a device's update counts: fields that every aggregator has."""

from __future__ import annotations

import dataclasses
from typing import Literal

from wire.delta import Vector
from wire.errors import PayloadError, Reason
from wire.messages import MAX_WEIGHT, Contribution

LIMIT = 2.0
"""|entry| < 2 keeps an entry within 31 bits and a sign; times a weight of 16 bits and 2^15 updates it stays within 62."""
FINEST, FINER = 255, 257
"""Weights by variance: examples up to 255, in 257ths, fill 16 bits."""


@dataclasses.dataclass(frozen=True)
class Weighing:
    """`weight_by` "examples": by the number of examples a device trained on; "uniform": every device alike; "variance": by
    examples (at most 255) over 1 + the variance of the estimate, so that in a mixed round scalars along M of d dimensions
    count about M / d of a delta."""

    weight_by: Literal["examples", "uniform", "variance"] = "examples"

    def weight(self, contribution: Contribution, noise: float) -> int:
        if self.weight_by == "uniform":
            return 1
        if self.weight_by == "examples":
            return min(contribution.weight, MAX_WEIGHT)
        return max(1, round(min(contribution.weight, FINEST) * FINER / (1 + noise)))

    def check(self, vector: Vector) -> None:
        if vector.size and not max(-float(vector.min()), float(vector.max())) < LIMIT:
            raise PayloadError(Reason.OUT_OF_RANGE, f"an entry of the update is {LIMIT} or more: training has diverged")
