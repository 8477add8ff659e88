"""`bpt`: an evolution strategy on an adapter of few numbers, by losses alone (FedBPT, arXiv 2310.01467)."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from edge_client.adapters import ADAPTERS, Adapter
from edge_client.engines import Engine, Tokens, tuned_numbers
from edge_client.methods import Draw, Progress, Trained, batches, check_between, check_positive
from wire import spec
from wire.delta import Delta, Layout, Vector
from wire.errors import MachineError
from wire.scalars import Directions, Trajectory
from wire.spec import Plain

Numbers = npt.NDArray[np.float64]


class SeparableCma:
    """CMA-ES with a diagonal covariance (sep-CMA-ES, Ros & Hansen 2008): memory and time are linear in the dimensions.

    `ask` gives float64 [population, dimensions] to measure, `tell` takes what was found for each, lower being better.
    """

    def __init__(self, mean: Numbers, sigma: float, population: int, seed: int) -> None:
        self.mean, self.sigma = mean, sigma
        self._chance = np.random.Generator(np.random.Philox(key=seed))
        self._variances = np.ones_like(self.mean)
        self._path, self._long_path = np.zeros_like(self.mean), np.zeros_like(self.mean)
        self._set(population, self.mean.size)

    def _set(self, population: int, n: int) -> None:
        """The strategy's constants, as its authors give them."""
        ranks = np.log(population / 2 + 0.5) - np.log(np.arange(1, population // 2 + 1))
        self._population, self._weights = population, ranks / ranks.sum()
        self._effective = effective = 1 / float((self._weights**2).sum())
        self._step_rate = (effective + 2) / (n + effective + 5)
        self._damping = 1 + 2 * max(0.0, math.sqrt((effective - 1) / (n + 1)) - 1) + self._step_rate
        self._path_rate = (4 + effective / n) / (n + 4 + 2 * effective / n)
        faster = (n + 2) / 3  # a diagonal has so many fewer numbers to learn than a matrix
        self._one_rate = min(1.0, faster * 2 / ((n + 1.3) ** 2 + effective))
        many = faster * 2 * (effective - 2 + 1 / effective) / ((n + 2) ** 2 + effective)
        self._many_rate = min(1 - self._one_rate, many)
        self._usual = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))  # the mean length of a normal vector

    def ask(self) -> Numbers:
        self._drawn = self._chance.standard_normal((self._population, self.mean.size)) * np.sqrt(self._variances)
        asked: Numbers = self.mean + self.sigma * self._drawn
        return asked

    def tell(self, losses: Numbers) -> None:
        best = self._drawn[np.argsort(losses, kind="stable")[: len(self._weights)]]
        step = self._weights @ best
        self.mean = self.mean + self.sigma * step
        keep = 1 - self._step_rate
        self._path = keep * self._path + math.sqrt((1 - keep**2) * self._effective) * step / np.sqrt(self._variances)
        length = float(np.linalg.norm(self._path))
        keep = 1 - self._path_rate
        self._long_path = keep * self._long_path
        if length < (1.4 + 2 / (self.mean.size + 1)) * self._usual:  # not while sigma is far too small
            self._long_path += math.sqrt((1 - keep**2) * self._effective) * step
        learned = self._one_rate * self._long_path**2 + self._many_rate * (self._weights @ best**2)
        self._variances = (1 - self._one_rate - self._many_rate) * self._variances + learned
        self.sigma *= math.exp(min(1.0, self._step_rate / self._damping * (length / self._usual - 1)))


@dataclasses.dataclass(frozen=True)
class Bpt:
    """Per round: `local_steps` generations of a `population` (None: 4 + 3 ln d of d dimensions), each measured on one batch.

    What travels is how far the distribution's mean has moved, as a delta. Each round starts again at `sigma`, the standard
    deviation of an entry, which follows `schedule` over the run: a device keeps no state between rounds.
    """

    adapter: Plain = dataclasses.field(default_factory=lambda: {"id": "projected_prompt"})
    local_steps: int = 8
    population: int | None = None
    batch: int = 4
    sequence_length: int = 128
    sigma: float = 0.25
    schedule: Literal["constant", "linear"] = "linear"
    id: ClassVar[str] = "bpt"
    forward_only: ClassVar[bool] = True
    deltas: ClassVar[bool] = True
    cuts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_between("local_steps", self.local_steps, 1, 65_536)
        check_between("population", self.population or 4, 4, 4096)
        check_between("batch", self.batch, 1, 4096)
        check_between("sequence_length", self.sequence_length, 2, 1 << 17)
        check_positive(sigma=self.sigma)
        self.tunes()

    def tunes(self) -> Adapter:
        row: Adapter = spec.build(ADAPTERS, self.adapter, "method.adapter")
        return row

    def directions(self) -> Directions | None:
        return None

    def train(
        self, engine: Engine, start: Trajectory, train: Sequence[Tokens], draw: Draw, progress: Progress | None = None
    ) -> Trained:
        began = time.perf_counter()
        where = _entries(engine.layout, draw.tuned)
        population = self.population or 4 + int(3 * math.log(len(where)))
        sigma = self.sigma * (1.0 if self.schedule == "constant" else 1.0 - draw.done)
        strategy = SeparableCma(start.adapter[where].astype(np.float64), sigma, population, draw.seed)
        losses, tokens = [], 0
        for number, batch in enumerate(batches(train, self.local_steps, self.batch, draw.seed)):
            asked = [_moved(start.adapter, where, point) for point in strategy.ask()]
            found = engine.losses(batch, asked)
            if not np.isfinite(found).all():
                raise MachineError("the training loss is not finite; lower the run's sigma")
            strategy.tell(found)
            losses.append(float(found.mean()))
            tokens += population * sum(len(sequence.ids) for sequence in batch)
            if progress is not None:
                progress(number + 1, self.local_steps, losses[-1])
        adapter = _moved(start.adapter, where, strategy.mean)
        delta = Delta(engine.layout, adapter - start.adapter)
        seconds, mean = time.perf_counter() - began, sum(losses) / len(losses)
        return Trained(delta, adapter, mean, self.local_steps, tokens, seconds, self.local_steps * population)


def _entries(layout: Layout, tuned: Sequence[int] | None) -> npt.NDArray[np.int64]:
    """The entries of the vector that are searched."""
    places = [place for _, place in layout.slices()]
    return np.concatenate([np.arange(places[n].start, places[n].stop) for n in tuned_numbers(layout, tuned)])


def _moved(adapter: Vector, where: npt.NDArray[np.int64], to: Numbers) -> Vector:
    moved = adapter.copy()
    moved[where] = to
    return moved
