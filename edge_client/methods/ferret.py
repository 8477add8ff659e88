"""`ferret`: first-order steps, sent as their projections on shared directions (arXiv 2409.06277): the bridge between both."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from edge_client.engines import GradEngine, Tokens
from edge_client.methods import Draw, Progress, Trained, check_between
from edge_client.methods.lora import Lora
from wire.errors import MachineError
from wire.scalars import Directions, Scalars, Step, Trajectory


@dataclasses.dataclass(frozen=True)
class Ferret(Lora):
    """As `lora`, but what travels are `projections` numbers: each the delta's share along a direction that all know.

    A projection on K of d dimensions keeps K / d of the energy and adds noise; its least error is at the multiple
    (z · delta) / (K + d), which is what is sent.
    """

    projections: int = 256
    id: ClassVar[str] = "ferret"
    deltas: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_between("projections", self.projections, 1, 65_536)

    def directions(self) -> Directions:
        return Directions("round", self.projections)

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
        delta = (adapter - start.adapter).astype(np.float64)
        shares = [float(start.direction(draw.key, n) @ delta) for n in range(self.projections)]
        try:
            update = Scalars.of(start.directions, np.array(shares) / (self.projections + delta.size))
        except ValueError as error:
            raise MachineError(f"training has diverged: {error}; lower the run's learning_rate") from error
        reached = start.adapter + start.delta(Step(((draw.key, update.units),)))
        seconds = time.perf_counter() - began
        forwards = 3 * self.local_steps
        return Trained(update, reached, sum(losses) / len(losses), self.local_steps, tokens, seconds, forwards)
