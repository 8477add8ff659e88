"""FedEx-LoRA (arXiv 2410.09432): A and B are averaged, and what the mean of their products has beyond that is kept beside."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from coordinator.aggregators.individual import Individual
from coordinator.aggregators.products import Pair, Product, Term, nearest, total, weighted
from wire.delta import Layout, Vector
from wire.errors import SpecError
from wire.portion_rules import Rule


@dataclasses.dataclass(frozen=True)
class FedEx(Individual):
    """The residual is added to the history, not to the base, which stays quantized as it is. It is exact while the history's
    rank holds it, and the nearest of that rank beyond."""

    history: ClassVar[bool] = True
    id: ClassVar[str] = "fedex"

    def check_layout(self, layout: Layout, portions: Rule | None) -> None:
        super().check_layout(layout, portions)
        if portions is not None and portions.least_rank is not None:
            raise SpecError(
                "aggregator: fedex takes devices of one rank; a smaller one has not what the residual corrects"
            )

    def combined(
        self, pair: Pair, tuned: Sequence[Term], start: Vector, mean: Vector
    ) -> Iterator[tuple[Pair, Product]]:
        assert pair.history is not None, "see check_layout"
        before = pair.history.of(start)
        owed = [before, *weighted(tuned), pair.of(mean).times(-1)]
        yield pair.history, nearest(total(owed), pair.history.rank, spare=np.zeros_like(before.a))
