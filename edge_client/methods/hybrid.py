"""`hybrid`: gradients for the layers above a boundary, losses for those below (hybrid order, HO-FL)."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import numpy as np

from edge_client.engines import HybridEngine, Tokens
from edge_client.methods import Draw, Progress, Trained, batches, check_between, check_positive
from edge_client.methods.lora import Lora
from edge_client.methods.slopes import Numbers, Slopes, said
from wire.delta import Delta, Vector
from wire.scalars import Directions, Trajectory
from wire.split import Split


@dataclasses.dataclass(frozen=True)
class Hybrid(Lora):
    """As `lora` in the last `layers` layers (None: as many as the device's memory allows; if that is all, it is `lora`).

    The backward pass ends at the boundary with the loss's derivative by what enters there. Below, a local step measures
    `perturbations` directions: how that derivative's product with what enters changes from x + εz to x - εz. No perturbed pass
    goes beyond the boundary. What travels is a delta for the layers above and a number a direction for those below.
    """

    layers: int | None = None
    perturbations: int = 1
    epsilon: float = 3e-3
    learning_rate_below: float = 1e-3
    bits: Literal[8, 16, 32] = 16
    id: ClassVar[str] = "hybrid"
    cuts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.align is not None:
            raise ValueError("align turns whole factors, and below the cut there are scalars alone")
        if self.layers is not None:
            check_between("layers", self.layers, 1, 10_000)
        check_between("perturbations", self.perturbations, 1, 4096)
        check_between("local_steps * perturbations", self.local_steps * self.perturbations, 1, 65_536)
        check_positive(epsilon=self.epsilon, learning_rate_below=self.learning_rate_below)

    def directions(self) -> Directions:
        return Directions("device", self.local_steps * self.perturbations, self.bits)

    def train(
        self,
        engine: Any,  # a HybridEngine
        start: Trajectory,
        train: Sequence[Tokens],
        draw: Draw,
        progress: Progress | None = None,
    ) -> Trained:
        below = engine.start_above(self.optimizer, self.layers, self.batch, self.sequence_length)
        if below == 0:
            return super().train(engine, start, train, draw, progress)
        began = time.perf_counter()
        engine.write(start.adapter)
        walk = _Walk(self, engine, start, below, draw.key)
        losses, tokens = [], 0
        for number, batch in enumerate(batches(train, self.local_steps, self.batch, draw.seed)):
            losses.append(engine.step(batch, self._rate(number)))
            walk.step(number)
            tokens += sum(len(sequence.ids) for sequence in batch)
            if progress is not None:
                progress(number + 1, self.local_steps, losses[-1])
        update = walk.update()
        reached = start.adapter + update.vector(draw.key, start.version)
        seconds, mean = time.perf_counter() - began, sum(losses) / len(losses)
        forwards = self._forwards(engine.share_below())
        return Trained(update, reached, mean, self.local_steps, tokens, seconds, forwards)

    def _forwards(self, below: float) -> int:
        """In passes of one batch through the whole model, with `below` of the layers below the cut."""
        return round(self.local_steps * ((1 + 2 * self.perturbations) * below + 3 * (1 - below)))


class _Walk:
    """The way of the entries below: by slopes along directions, while the engine's optimizer moves those above."""

    def __init__(self, method: Hybrid, engine: HybridEngine, start: Trajectory, below: int, key: int) -> None:
        self._method, self._engine, self._start, self._key, self._below = method, engine, start, key, below
        layout = start.layout.below(below)
        self._lower = Trajectory.start(start.directions, layout, start.adapter[: layout.size], start.version)
        self._adapter: Vector = self._lower.adapter.copy()
        self._slopes = Slopes(True)
        self._multiples: Numbers = np.zeros(method.local_steps * method.perturbations)

    def step(self, number: int) -> None:
        """Measure local step `number`'s directions at the batch of the engine's last step, then move."""
        of, moved = self._method.perturbations, self._adapter.copy()
        for n in range(number * of, (number + 1) * of):
            direction = self._lower.direction(self._key, n)
            shift = np.float32(self._method.epsilon) * direction
            up, down = self._engine.surrogates([self._adapter + shift, self._adapter - shift])
            slope = self._slopes.usual(float(up - down) / (2 * self._method.epsilon))
            self._multiples[n] = -self._method.learning_rate_below * slope / of
            moved += np.float32(self._multiples[n]) * direction
        self._adapter = moved
        self._engine.write_below(moved)

    def update(self) -> Split:
        size = self._lower.layout.size
        delta = self._engine.read()[size:] - self._start.adapter[size:]
        upper = Delta(self._start.layout.above(self._below), delta)
        return Split(self._start.layout, self._below, said(self._start.directions, self._multiples), upper)
