"""FlexLoRA (arXiv 2402.11505): the mean of the products, cut to the adapter's rank; devices may have smaller ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

from coordinator.aggregators.individual import Individual
from coordinator.aggregators.products import Pair, Product, Term, nearest, total, weighted
from wire.delta import Vector


@dataclasses.dataclass(frozen=True)
class FlexLora(Individual):
    """A device that has fewer ranks takes the first: the directions of the largest singular values."""

    id: ClassVar[str] = "flexlora"

    def combined(
        self, pair: Pair, tuned: Sequence[Term], start: Vector, mean: Vector
    ) -> Iterator[tuple[Pair, Product]]:
        before = pair.of(start)
        yield pair, nearest(total(weighted(tuned)), pair.rank, spare=before.a)
