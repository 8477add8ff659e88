"""How updates become the next adapter: an aggregator folds them to one mean delta, a server optimizer makes the step.

Sums are int64 fixed point: the same bits in any order, in any process, and mergeable, so that a round can be computed
twice, in parts, or again years later, and give the same release. Aggregators that multiply each device's factors
(`individual.py`) go by floating point: another machine gets the same to a few parts in a million.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from wire.codecs.chain import Chain
from wire.delta import Layout, Vector
from wire.messages import Contribution
from wire.portion_rules import Rule
from wire.portions import Portion


class Sum(Protocol):
    """A fold in progress: constant memory, whatever the number of updates."""

    def add(self, vector: Vector, weight: int, portion: Portion | None = None) -> None:
        """Add one update, float32 [size]; of a `portion`, which is zero elsewhere."""

    def add_coded(self, codec: Chain, payload: memoryview, layout: Layout, weight: int) -> bool:
        """Add what `codec` decodes from `payload`, a code or a tensor at a time: the same sum. False, and nothing added, where
        the codec decodes in one piece only. Raises PayloadError, as late as at the end."""

    def mean(self) -> Vector:
        """The weighted mean so far, float32 [size]."""


class Aggregator(Protocol):
    """A row of AGGREGATORS. `individual`: it needs every update by itself, so nothing may hide them behind their sum, and it
    holds them all. `bitwise`: its sums are of integers, so that every machine gets the same bits."""

    id: str
    individual: bool
    bitwise: bool

    def check_layout(self, layout: Layout, portions: Rule | None) -> None:
        """Raises SpecError for a layout, or for portions of it, that it has no use for."""

    def start(self, layout: Layout, adapter: Vector) -> Sum:
        """An empty fold of updates to `adapter`, float32 [layout.size]."""

    def weight(self, contribution: Contribution, noise: float) -> int:
        """What a contribution counts, 1 to 65535. `noise`: its direction's variance relative to the gradient's square."""

    def check(self, vector: Vector) -> None:
        """Refuse an update that `add` could not hold. Raises PayloadError(OUT_OF_RANGE)."""


class ServerOptimizer(Protocol):
    """A row of SERVER_OPTIMIZERS. Its state is one float32 vector, stored with the release (None: it has none)."""

    id: str

    def state_size(self, size: int) -> int:
        """Entries of the state for an adapter of `size` entries; 0 for none."""

    def step(self, delta: Vector, state: Vector) -> tuple[Vector, Vector]:
        """What the mean delta adds to the adapter, and the next state, float32 both. A zero state is the first."""


AGGREGATORS: Mapping[str, str] = {
    "mean": "coordinator.aggregators.mean:Mean",
    "flexlora": "coordinator.aggregators.flexlora:FlexLora",
    "flora": "coordinator.aggregators.flora:Flora",
    "fedex": "coordinator.aggregators.fedex:FedEx",
    "lora_fair": "coordinator.aggregators.lora_fair:LoraFair",
    "hetlora": "coordinator.aggregators.hetlora:HetLora",
}
SERVER_OPTIMIZERS: Mapping[str, str] = {
    "average": "coordinator.aggregators.server_optimizers:Average",
    "momentum": "coordinator.aggregators.server_optimizers:Momentum",
    "adam": "coordinator.aggregators.server_optimizers:Adam",
}
