"""Aggregators that need every device's factors by themselves: what they share.

A row says what becomes of one module; all that is no factor of a module goes by the mean.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator, Sequence
from typing import ClassVar

from coordinator.aggregators.mean import FixedPointSum
from coordinator.aggregators.products import Pair, Product, Term, Update, pairs, terms
from coordinator.aggregators.weighing import Weighing
from wire.codecs.chain import Chain
from wire.delta import Layout, Vector
from wire.errors import SpecError
from wire.portion_rules import Rule
from wire.portions import Portion


class IndividualSum:
    """Holds every update: memory is their number times the adapter, 4 bytes an entry, until `mean` is asked for."""

    def __init__(self, layout: Layout, adapter: Vector, row: Individual) -> None:
        self._adapter, self._row = adapter, row
        self._pairs, self._updates = pairs(layout), list[Update]()
        self._mean = FixedPointSum(layout)

    def add(self, vector: Vector, weight: int, portion: Portion | None = None) -> None:
        self._updates.append(Update(vector, weight, portion))
        self._mean.add(vector, weight, portion)

    def add_coded(self, codec: Chain, payload: memoryview, layout: Layout, weight: int) -> bool:
        return False

    def mean(self) -> Vector:
        """What leads from the adapter to the new one, float32 [layout.size]. A module that nobody tuned stays."""
        delta = self._mean.mean()
        mean = self._adapter + delta
        for pair in self._pairs:
            if tuned := terms(pair, self._adapter, self._updates):
                for changed, product in self._row.combined(pair, tuned, self._adapter, mean):
                    before = changed.of(self._adapter)
                    changed.put(Product(product.b - before.b, product.a - before.a), delta)
        return delta


@dataclasses.dataclass(frozen=True)
class Individual(Weighing, abc.ABC):
    """What a row of this kind has beside its `combined`. `history`: it needs a place to keep what it cannot say by A and B."""

    individual: ClassVar[bool] = True
    bitwise: ClassVar[bool] = False
    history: ClassVar[bool] = False

    def check_layout(self, layout: Layout, portions: Rule | None) -> None:
        found = pairs(layout)
        if self.history and any(pair.history is None for pair in found):
            raise SpecError("aggregator: it keeps a history, so that every module needs one: adapter.history = RANK")

    def start(self, layout: Layout, adapter: Vector) -> IndividualSum:
        return IndividualSum(layout, adapter, self)

    @abc.abstractmethod
    def combined(
        self, pair: Pair, tuned: Sequence[Term], start: Vector, mean: Vector
    ) -> Iterator[tuple[Pair, Product]]:
        """The new factors of a module, of its history, or of both; what is not said goes by the mean. `tuned`: each
        device's, at least one; `start`, `mean`: the adapter they started from, and that plus the mean of their deltas,
        float32 [layout.size]."""
