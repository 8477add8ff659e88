"""HetLoRA (arXiv 2401.06432): factors padded with zeros to one rank, each device by the size of its product."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from coordinator.aggregators.individual import Individual
from coordinator.aggregators.products import Pair, Product, Term, square
from wire.delta import Vector


@dataclasses.dataclass(frozen=True)
class HetLora(Individual):
    """A module's weight is a device's share times ‖B·A‖; alike for all where nobody has learned anything. Rows that no device
    has stay: zeros in A and B could not be learned again."""

    id: ClassVar[str] = "hetlora"

    def combined(
        self, pair: Pair, tuned: Sequence[Term], start: Vector, mean: Vector
    ) -> Iterator[tuple[Pair, Product]]:
        sizes = np.array([term.share * np.sqrt(square(term.product)) for term in tuned])
        sizes = sizes if sizes.any() else np.array([term.share for term in tuned])
        made, widest = pair.of(start), max(term.product.rank for term in tuned)
        made.b[:, :widest], made.a[:widest] = 0, 0
        for part, term in zip(sizes / sizes.sum(), tuned, strict=True):
            rank = term.product.rank
            made.b[:, :rank] += part * term.product.b
            made.a[:rank] += part * term.product.a
        yield pair, made
