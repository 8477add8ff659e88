"""FLoRA (arXiv 2409.05976): the products are stacked, not averaged; A and B start anew each round."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from coordinator.aggregators.individual import Individual
from coordinator.aggregators.products import Pair, Product, Term, nearest, total, weighted
from wire.delta import Layout, Vector
from wire.errors import SpecError
from wire.portion_rules import Alternate, Rule


@dataclasses.dataclass(frozen=True)
class Flora(Individual):
    """The stack lies in the history, beside a base that stays quantized as it is. It is exact while the history's rank holds
    what was learned, and the nearest of that rank beyond."""

    history: ClassVar[bool] = True
    id: ClassVar[str] = "flora"

    def check_layout(self, layout: Layout, portions: Rule | None) -> None:
        super().check_layout(layout, portions)
        if isinstance(portions, Alternate):
            raise SpecError(
                "aggregator: flora starts A and B anew each round, and B as zeros, beside which A alone learns nothing: choose"
                ' another aggregator (the mean of products is exact with alternate), or [portions] id = "tuned"'
            )

    def combined(
        self, pair: Pair, tuned: Sequence[Term], start: Vector, mean: Vector
    ) -> Iterator[tuple[Pair, Product]]:
        assert pair.history is not None, "see check_layout"
        before = pair.history.of(start)
        learned = [before, *weighted(tuned), pair.of(start).times(-1)]
        yield pair, pair.of(start)
        yield pair.history, nearest(total(learned), pair.history.rank, spare=np.zeros_like(before.a))
