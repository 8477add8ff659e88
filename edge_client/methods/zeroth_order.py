"""Zeroth-order methods: losses along ±ε directions, no gradient, no activations kept (SPSA; MeZO, arXiv 2305.17333).

The rows share one loop and differ in whose directions a round measures, and so in what the run's state is. The base is never
changed: only the adapter's floats are perturbed, over frozen integer codes (as in QuZO's setting, arXiv 2502.12346).
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from edge_client.adapters import ADAPTERS, Adapter
from edge_client.engines import Engine, Tokens
from edge_client.methods import Draw, Progress, Trained, batches, check_between, check_positive
from edge_client.methods.slopes import Numbers, Slopes, said
from wire import spec
from wire.delta import Vector
from wire.errors import MachineError
from wire.scalars import Directions, Step, Trajectory
from wire.spec import Plain
from wire.subspace import Subspace


@dataclasses.dataclass(frozen=True)
class ZerothOrder:
    """Per round: `local_steps` steps on `batch` sequences, each along the mean of `perturbations` directions.

    `adapter` is a row of ADAPTERS: the fewer its parameters, the more each direction says (the cosine to the true
    gradient is about sqrt(directions / parameters)). `difference` "central" costs two forwards a direction and has no
    bias of even order, "one-sided" one forward a direction and one a step. `normalize` divides derivatives by the
    round's mean magnitude, so that `learning_rate` is what an entry moves a step. `schedule` runs over the whole run.
    With `subspace` directions are of low rank (SubZero, LOZO).
    """

    adapter: Plain = dataclasses.field(default_factory=lambda: {"id": "lora_sb", "rank": 8})
    local_steps: int = 32
    perturbations: int = 1
    batch: int = 4
    sequence_length: int = 128
    epsilon: float = 3e-3
    learning_rate: float = 1e-2
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    difference: Literal["central", "one-sided"] = "central"
    normalize: bool = True
    bits: Literal[8, 16, 32] = 16
    subspace: Subspace | None = None
    id: ClassVar[str]
    forward_only: ClassVar[bool] = True
    deltas: ClassVar[bool] = False
    cuts: ClassVar[bool] = False
    drawn: ClassVar[Literal["round", "device", "pool"]]

    def __post_init__(self) -> None:
        check_between("local_steps", self.local_steps, 1, 65_536)
        check_between("perturbations", self.perturbations, 1, 4096)
        check_between("local_steps * perturbations", self.local_steps * self.perturbations, 1, 65_536)
        check_between("batch", self.batch, 1, 4096)
        check_between("sequence_length", self.sequence_length, 2, 1 << 17)
        check_positive(epsilon=self.epsilon, learning_rate=self.learning_rate)
        self.directions()
        self.tunes()

    def tunes(self) -> Adapter:
        row: Adapter = spec.build(ADAPTERS, self.adapter, "method.adapter")
        return row

    def directions(self) -> Directions:
        return Directions(self.drawn, self.local_steps * self.perturbations, self.bits, subspace=self.subspace)

    def train(
        self, engine: Engine, start: Trajectory, train: Sequence[Tokens], draw: Draw, progress: Progress | None = None
    ) -> Trained:
        began = time.perf_counter()
        walk = _Walk(self, engine, start, draw)
        for number, batch in enumerate(batches(train, self.local_steps, self.batch, draw.seed)):
            walk.measure(batch, self._numbers(number, start, draw))
            if number + 1 == self.local_steps or self._ready(walk.pending):
                walk.move()
            if progress is not None:
                progress(number + 1, self.local_steps, walk.losses[-1])
        update = said(start.directions, walk.multiples)
        reached = start.adapter + start.delta(Step(((draw.key, update.units),)))
        seconds = time.perf_counter() - began
        mean = sum(walk.losses) / len(walk.losses)
        return Trained(update, reached, mean, self.local_steps, walk.tokens, seconds, walk.forwards)

    def _numbers(self, step: int, start: Trajectory, draw: Draw) -> Sequence[int]:
        """Which directions local step `step` measures."""
        return range(step * self.perturbations, (step + 1) * self.perturbations)

    def _ready(self, pending: Sequence[Move]) -> bool:
        """Whether what was measured since the last move is enough to move by."""
        return True

    def rate(self, done: float) -> float:
        """The learning rate when `done` of the run's rounds are past."""
        factors = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
        return self.learning_rate * factors[self.schedule]


@dataclasses.dataclass(frozen=True)
class Mezo(ZerothOrder):
    """Every device its own directions (FedMeZO, arXiv 2402.05926): a cohort of n measures n times as many."""

    id: ClassVar[str] = "mezo"
    drawn: ClassVar[Literal["round", "device", "pool"]] = "device"


@dataclasses.dataclass(frozen=True)
class DeComFL(ZerothOrder):
    """One set of directions a round for all devices, scalars both ways (arXiv 2405.15861)."""

    id: ClassVar[str] = "decomfl"
    drawn: ClassVar[Literal["round", "device", "pool"]] = "round"


@dataclasses.dataclass(frozen=True)
class HiSo(ZerothOrder):
    """DeComFL with directions scaled by a diagonal curvature that everybody rebuilds from the same scalars
    (arXiv 2506.02370). `curvature` is the paper's ν. No byte more travels."""

    curvature: float = 0.1
    id: ClassVar[str] = "hiso"
    drawn: ClassVar[Literal["round", "device", "pool"]] = "round"

    def directions(self) -> Directions:
        return Directions(self.drawn, self.local_steps * self.perturbations, self.bits, self.curvature, self.subspace)


@dataclasses.dataclass(frozen=True)
class KSeed(ZerothOrder):
    """Directions from a pool of `pool` for the whole run, whose multiples are all of its state (FedKSeed, arXiv
    2312.06353). `pro` draws those more often that have moved the run most, as FedKSeed-Pro does."""

    pool: int = 4096
    pro: bool = False
    id: ClassVar[str] = "kseed"
    drawn: ClassVar[Literal["round", "device", "pool"]] = "pool"

    def __post_init__(self) -> None:
        check_between("pool", self.pool, 1, 65_536)
        super().__post_init__()

    def directions(self) -> Directions:
        return Directions(self.drawn, self.pool, self.bits, subspace=self.subspace)

    def _numbers(self, step: int, start: Trajectory, draw: Draw) -> Sequence[int]:
        chance = np.random.Generator(np.random.Philox(key=(draw.seed << 20) + step))
        weights = _preferred(start.sums) if self.pro else None
        drawn: list[int] = chance.choice(self.pool, self.perturbations, p=weights).tolist()
        return drawn


def _preferred(sums: npt.NDArray[np.int64] | None) -> Numbers | None:
    """softmax of the min-max normalized magnitudes of a pool's multiples: FedKSeed-Pro's probabilities."""
    if sums is None or not sums.any():
        return None
    size = np.abs(sums).astype(np.float64)
    raised = np.exp((size - size.min()) / max(size.max() - size.min(), 1e-12))
    weights: Numbers = raised / raised.sum()
    return weights


@dataclasses.dataclass(frozen=True)
class FwdLLM(ZerothOrder):
    """Fewer, better directions (arXiv 2308.13894). Of `candidates` directions for each that is measured, those are taken that
    lie most along the run's last step, either way. And a move waits until the squared standard error of an entry of its
    estimate, in squares of the round's usual slope, is at most `variance`: steep batches are averaged longer."""

    candidates: int = 4
    variance: float = 0.25
    difference: Literal["central", "one-sided"] = "one-sided"
    id: ClassVar[str] = "fwdllm"
    drawn: ClassVar[Literal["round", "device", "pool"]] = "device"

    def __post_init__(self) -> None:
        check_between("candidates", self.candidates, 1, 64)
        if self.variance <= 0:
            raise ValueError("variance must be positive")
        super().__post_init__()

    def directions(self) -> Directions:
        count = self.local_steps * self.perturbations * self.candidates
        return Directions(self.drawn, count, self.bits, subspace=self.subspace)

    def _numbers(self, step: int, start: Trajectory, draw: Draw) -> Sequence[int]:
        each = self.perturbations * self.candidates
        offered = range(step * each, (step + 1) * each)
        if start.moved is None:  # the first round, or a device that has just come: there is nothing to go by
            return offered[: self.perturbations]
        moved = start.moved.astype(np.float64)
        along = {number: abs(float(start.direction(draw.key, number) @ moved)) for number in offered}
        return sorted(sorted(offered, key=lambda number: -along[number])[: self.perturbations])

    def _ready(self, pending: Sequence[Move]) -> bool:
        mean_square = sum(move.slope**2 for move in pending) / len(pending)
        return mean_square / len(pending) <= self.variance


@dataclasses.dataclass(frozen=True, eq=False)
class Move:
    """A direction that was measured, and the slope along it."""

    number: int
    direction: Vector
    slope: float


class _Walk:
    """One round's way: where the adapter is, what each direction has been multiplied by so far, and the cost."""

    def __init__(self, method: ZerothOrder, engine: Engine, start: Trajectory, draw: Draw) -> None:
        self._method, self._engine, self._start, self._key = method, engine, start, draw.key
        self._rate = method.rate(draw.done)
        self._adapter = start.adapter.copy()
        self._slopes = Slopes(method.normalize)
        self.pending: list[Move] = []
        self.multiples: Numbers = np.zeros(start.directions.count)
        self.losses: list[float] = []
        self.tokens = self.forwards = 0

    def measure(self, batch: Sequence[Tokens], numbers: Sequence[int]) -> None:
        """The slopes of `batch` along `numbers`, from where the adapter is."""
        central = self._method.difference == "central"
        here = None if central else float(self._measured(batch, [self._adapter])[0])
        for number in numbers:
            direction = self._start.direction(self._key, number)
            slope, loss = self._slope(batch, direction, here)
            self.losses.append(loss)
            self.pending.append(Move(number, direction, self._slopes.usual(slope)))

    def move(self) -> None:
        """Along the mean of all that was measured since the last move."""
        for move in self.pending:
            multiple = -self._rate * move.slope / len(self.pending)
            self.multiples[move.number] += multiple
            self._adapter += np.float32(multiple) * move.direction
        self.pending = []

    def _slope(self, batch: Sequence[Tokens], direction: Vector, here: float | None) -> tuple[float, float]:
        """The loss's derivative along `direction`, and the loss, both of `batch`."""
        shift = np.float32(self._method.epsilon) * direction
        if here is not None:
            up = float(self._measured(batch, [self._adapter + shift])[0])
            return (up - here) / self._method.epsilon, here
        up, down = self._measured(batch, [self._adapter + shift, self._adapter - shift])
        return float(up - down) / (2 * self._method.epsilon), float(up + down) / 2

    def _measured(self, batch: Sequence[Tokens], adapters: list[Vector]) -> Numbers:
        losses = self._engine.losses(batch, adapters)
        if not np.isfinite(losses).all():
            raise MachineError("the training loss is not finite; lower the run's learning_rate or epsilon")
        self.forwards += len(adapters)
        self.tokens += len(adapters) * sum(len(sequence.ids) for sequence in batch)
        return losses
