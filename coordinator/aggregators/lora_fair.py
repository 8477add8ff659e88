"""LoRA-FAIR (arXiv 2411.14961): A and B are averaged, and B is then refined towards the mean of the products."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from coordinator.aggregators.individual import Individual
from coordinator.aggregators.products import Pair, Product, Term, total, weighted
from wire.delta import Vector


@dataclasses.dataclass(frozen=True)
class LoraFair(Individual):
    """The correction D of B is the one that minimizes ‖mean of B·A - (mean B + D)·mean A‖² + penalty ‖D‖²: a system of the
    adapter's rank."""

    penalty: float = 0.01
    id: ClassVar[str] = "lora_fair"

    def __post_init__(self) -> None:
        if self.penalty <= 0:
            raise ValueError("penalty must be positive")

    def combined(
        self, pair: Pair, tuned: Sequence[Term], start: Vector, mean: Vector
    ) -> Iterator[tuple[Pair, Product]]:
        middle = pair.of(mean)
        missed = total([*weighted(tuned), middle.times(-1)])
        along = missed.b @ (missed.a @ middle.a.T)
        system = middle.a @ middle.a.T + self.penalty * np.eye(pair.rank)
        yield pair, Product(middle.b + np.linalg.solve(system, along.T).T, middle.a)
