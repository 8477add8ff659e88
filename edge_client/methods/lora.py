"""`lora`: low-rank adapters by backpropagation (arXiv 2106.09685), on a quantized base QLoRA (arXiv 2305.14314)."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import ClassVar, Literal

from edge_client.adapters import ADAPTERS, Adapter
from edge_client.adapters.low_rank import ALL, LoraFactors, check_sizes, check_targets
from edge_client.engines import GradEngine, Optimizer, Tokens
from edge_client.methods import Draw, Progress, Trained, batches, check_between
from edge_client.methods.alignment import aligned
from wire import spec
from wire.delta import Delta, Layout, Vector
from wire.scalars import Directions, Trajectory
from wire.spec import Plain


@dataclasses.dataclass(frozen=True)
class Lora:
    """Per round: `local_steps` optimizer steps of `batch` sequences of at most `sequence_length` tokens.

    `targets` are module names or their last parts ("q_proj"), or "all-linear". Both factors are tuned and averaged.
    `adapter` tunes another row of ADAPTERS by the same steps: rank, alpha and targets then come from its table. With `align`,
    above 0 and at most 1, factors are turned towards the release before they are sent, by A and by B in turn (FedRot-LoRA).
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | str = ALL
    local_steps: int = 8
    batch: int = 4
    sequence_length: int = 128
    learning_rate: float = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    optimizer: Optimizer = Optimizer()
    adapter: Plain | None = None
    align: float | None = dataclasses.field(default=None, metadata=spec.LATER)
    id: ClassVar[str] = "lora"
    forward_only: ClassVar[bool] = False
    deltas: ClassVar[bool] = True
    cuts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_sizes(self.rank, self.alpha, None)
        check_targets(self.targets)
        check_between("local_steps", self.local_steps, 1, 1_000_000)
        check_between("batch", self.batch, 1, 4096)
        check_between("sequence_length", self.sequence_length, 2, 1 << 17)
        check_between("warmup_steps", self.warmup_steps, 0, self.local_steps)
        if self.learning_rate <= 0:
            raise ValueError("learning_rate must be positive")
        if self.align is not None and not 0 < self.align <= 1:
            raise ValueError("align must be above 0 and at most 1")

    def tunes(self) -> Adapter:
        if self.adapter is None:
            return LoraFactors(self.rank, self.alpha, self.targets)
        row: Adapter = spec.build(ADAPTERS, self.adapter, "method.adapter")
        return row

    def directions(self) -> Directions | None:
        return None

    def train(
        self,
        engine: GradEngine,
        start: Trajectory,
        train: Sequence[Tokens],
        draw: Draw,
        progress: Progress | None = None,
    ) -> Trained:
        began = time.perf_counter()
        adapter, losses, tokens = self.steps(engine, start, train, draw, progress)
        seconds = time.perf_counter() - began
        delta = Delta(engine.layout, adapter - start.adapter)
        return Trained(
            delta, adapter, sum(losses) / len(losses), self.local_steps, tokens, seconds, 3 * self.local_steps
        )

    def steps(
        self, engine: GradEngine, start: Trajectory, train: Sequence[Tokens], draw: Draw, progress: Progress | None
    ) -> tuple[Vector, list[float], int]:
        """The adapter after the local steps, the loss of each, and the tokens read."""
        engine.write(start.adapter)
        engine.start(self.optimizer, draw.tuned)
        losses, tokens = [], 0
        for number, batch in enumerate(batches(train, self.local_steps, self.batch, draw.seed)):
            losses.append(engine.step(batch, self._rate(number)))
            tokens += sum(len(sequence.ids) for sequence in batch)
            if progress is not None:
                progress(number + 1, self.local_steps, losses[-1])
        return self._aligned(engine.read(), start, engine.layout, draw), losses, tokens

    def _aligned(self, adapter: Vector, start: Trajectory, layout: Layout, draw: Draw) -> Vector:
        if self.align is None:
            return adapter
        by = "B" if start.version % 2 else "A"  # B is zero in release 0 and could not be turned to
        return aligned(adapter, start.adapter, layout, self.align, by, draw.tuned)

    def _rate(self, number: int) -> float:
        """The learning rate of local step `number`, counted from 0."""
        if number < self.warmup_steps:
            return self.learning_rate * (number + 1) / self.warmup_steps
        done = (number - self.warmup_steps) / max(1, self.local_steps - self.warmup_steps)
        factors = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
        return self.learning_rate * factors[self.schedule]
