"""Tuning methods: frozen rows whose fields are their config, driving an engine from one adapter to a Delta."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from edge_client.engines import Adapter, Base, GradEngine, Tokens
from wire.delta import Delta, Layout, Vector

Progress = Callable[[int, int, float], None]
"""Called after each local step with (steps done, steps in all, loss of the last step in nats)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """What local training gives: the delta and what it cost. `loss` is the mean training loss of the steps, in nats."""

    delta: Delta
    loss: float
    steps: int
    tokens: int
    seconds: float


class Method(Protocol):
    """A row of METHODS."""

    id: str
    local_steps: int
    batch: int
    sequence_length: int

    def adapter(self, base: Base) -> Adapter:
        """What this method tunes on `base`. Raises SpecError for targets the base does not have."""

    def layout(self, base: Base) -> Layout:
        """The flat order of the tuned tensors, from the base's layer names and shapes alone."""

    def initial(self, layout: Layout, seed: int) -> Vector:
        """The adapter of release 0, float32 [layout.size]: the same bits on every machine."""

    def train(
        self, engine: GradEngine, start: Vector, train: Sequence[Tokens], seed: int, progress: Progress | None = None
    ) -> Trained:
        """Local steps from `start`; batches are drawn by `seed`. The engine's adapter afterwards is unspecified."""


METHODS: Mapping[str, str] = {
    "lora": "edge_client.methods.lora:Lora",
}
