"""Tuning methods: frozen rows whose fields are their config, driving an engine from one adapter to an update.

What is tuned is an adapter's matter (`edge_client.adapters`); how, a method's: by gradients or by losses alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from edge_client.adapters import Adapter
from edge_client.engines import Tokens
from wire.delta import Delta, Vector
from wire.scalars import Directions, Scalars, Trajectory
from wire.split import Split

Progress = Callable[[int, int, float], None]
"""Called after each local step with (steps done, steps in all, loss of the last step in nats)."""


@dataclasses.dataclass(frozen=True)
class Draw:
    """A task's chance and place: the seed of its batches, the key of its directions, how much of the run is done, and which of
    the engine's tensors are tuned (None: all that can be)."""

    seed: int
    key: int = 0
    done: float = 0.0
    tuned: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """What local training gives and what it cost. `adapter` is where the update leads; `loss` the mean training loss of
    the steps, in nats; `forwards` counts passes of one batch through the model, a backward pass as two."""

    update: Delta | Scalars | Split
    adapter: Vector
    loss: float
    steps: int
    tokens: int
    seconds: float
    forwards: int


class Method(Protocol):
    """A row of METHODS. `forward_only`: it needs losses, no gradients. `deltas`: its updates hold deltas, which a codec codes.
    `cuts`: it needs a HybridEngine."""

    id: str
    forward_only: bool
    deltas: bool
    cuts: bool
    local_steps: int
    batch: int
    sequence_length: int

    def tunes(self) -> Adapter:
        """What it tunes: a row of ADAPTERS."""

    def directions(self) -> Directions | None:
        """Along which directions it sends scalars; None for a method that sends none."""

    def train(
        self, engine: Any, start: Trajectory, train: Sequence[Tokens], draw: Draw, progress: Progress | None = None
    ) -> Trained:
        """Local steps from `start.adapter` on an Engine, or a GradEngine unless `forward_only`. The engine's adapter
        afterwards is unspecified. Raises MachineError for training that diverged."""


METHODS: Mapping[str, str] = {
    "lora": "edge_client.methods.lora:Lora",
    "bpt": "edge_client.methods.evolution:Bpt",
    "ferret": "edge_client.methods.ferret:Ferret",
    "hybrid": "edge_client.methods.hybrid:Hybrid",
    "mezo": "edge_client.methods.zeroth_order:Mezo",
    "kseed": "edge_client.methods.zeroth_order:KSeed",
    "decomfl": "edge_client.methods.zeroth_order:DeComFL",
    "hiso": "edge_client.methods.zeroth_order:HiSo",
    "fwdllm": "edge_client.methods.zeroth_order:FwdLLM",
}


def batches(train: Sequence[Tokens], steps: int, size: int, seed: int) -> Iterator[list[Tokens]]:
    """`steps` batches of `size`; every sequence once before any comes again."""
    chance = np.random.Generator(np.random.Philox(key=seed))
    waiting: list[int] = []
    for _ in range(steps):
        while len(waiting) < size:
            waiting += chance.permutation(len(train)).tolist()
        yield [train[i] for i in waiting[:size]]
        del waiting[:size]


def check_between(name: str, value: int, low: int, high: int) -> None:
    """Raises ValueError."""
    if not low <= value <= high:
        raise ValueError(f"{name} must lie between {low} and {high}")


def check_positive(**values: float) -> None:
    """Raises ValueError."""
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, not {value:g}")
