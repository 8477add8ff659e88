"""Which step, which rows and which thresholds give the least error for a number of bits: the encoder's side of `ecsq`.

Rows of about one scale are a class. From a histogram of each class follow, for any step, its bits and its error under every
threshold of `THRESHOLDS`; the best one has the least error + λ · bits, with λ = step² · ln 2 / 6, the slope of the rate of fine
steps; a class may also be left out. So a step determines all else, and a budget determines the step.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np
import numpy.typing as npt

from wire.codecs import tables
from wire.codecs.kernels import BINS, LARGEST, UNITS, Ints
from wire.codecs.rank_rows import RankRows
from wire.delta import Vector

Floats = npt.NDArray[np.float64]

PER_OCTAVE = 3
"""Classes for a doubling of the scale."""
BINS_PER_MEAN = 16
"""A histogram goes up to BINS / BINS_PER_MEAN times the mean magnitude of its class."""
SLOPE = math.log(2) / 6
THRESHOLDS: Floats = np.array([0, 128, 144, 160, 176, 200, 228, 256, 290]) / UNITS
"""From which part of a step on a magnitude is a level higher: 0 has no zero, 1/2 rounds, more is a dead zone."""
TABLE_BITS, LEVEL_BITS, ESCAPE_BITS = 40, 9, 16


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A step, a threshold for each class (nan: left out), and the bits and the squared error that each class is expected to take
    and to have."""

    step: float
    thresholds: Floats
    bits: Floats
    errors: Floats

    @property
    def total(self) -> float:
        return float(self.bits.sum())


@dataclasses.dataclass(frozen=True, eq=False)
class Survey:
    """What is known of the rows before they are quantized. `classes` int64 [rows], `means` float64 [rows], `scales` float64
    [classes]: the width of a bin; `sampled` int64 [classes, BINS], `sizes` int64 [classes]: entries. `out`: rows left out."""

    classes: Ints
    means: Floats
    scales: Floats
    sampled: Ints
    sizes: Ints
    out: npt.NDArray[np.bool_]

    def without(self, out: npt.NDArray[np.bool_], rows: RankRows) -> Survey:
        """The same with these rows left out."""
        sizes = np.bincount(self.classes, np.where(out, 0, rows.lengths), len(self.sizes)).astype(np.int64)
        return dataclasses.replace(self, sizes=sizes, out=out)

    def chosen(self, plan: Plan) -> Ints:
        """Each row's class, or -1 if it is left out."""
        return np.where(self.out | np.isnan(plan.thresholds)[self.classes], -1, self.classes)

    def fitted(self, plan: Plan, wanted: float, rows: RankRows) -> Ints:
        """As `chosen`, without the rows of least scale that do not go into `wanted` bits."""
        classes, order = self.chosen(plan), np.argsort(self.means, kind="stable")
        each = np.divide(plan.bits, self.sizes, out=np.zeros_like(plan.bits), where=self.sizes > 0)
        bits = np.where(classes >= 0, rows.lengths * each[self.classes], 0.0)[order]
        classes[order[: int(np.searchsorted(np.cumsum(bits), plan.total - wanted))]] = -1
        return classes

    def error(self, plan: Plan, classes: Ints, rows: RankRows) -> float:
        """What is expected of `plan` where only the rows of `classes` that are not -1 are sent."""
        dropped = np.bincount(self.classes, np.where(classes < 0, rows.lengths, 0), len(self.sizes))
        each = np.divide(self.energies - plan.errors, self.sizes, out=np.zeros_like(plan.errors), where=self.sizes > 0)
        return float((plan.errors + np.minimum(dropped, self.sizes) * each).sum())

    @functools.cached_property
    def energies(self) -> Floats:
        """The squared error of leaving each class out."""
        energies: Floats = (self.weights * self.middles**2).sum(axis=1)
        return energies

    @functools.cached_property
    def weights(self) -> Floats:
        """How many entries lie in each bin, float64 [classes, BINS]."""
        weights: Floats = self.sampled * (self.sizes / self.sampled.sum(axis=1))[:, None]
        return weights

    @functools.cached_property
    def middles(self) -> Floats:
        """Of each bin, float64 [classes, BINS]."""
        middles: Floats = (np.arange(BINS) + 0.5) * self.scales[:, None]
        return middles


def survey(values: Vector, largest: float, rows: RankRows, kernel: object) -> Survey:
    """Classes and their histograms, of `values` in row order; `largest`: of their magnitudes."""
    exponent = 23 - math.frexp(largest)[1]
    sums = kernel.sums(values, np.float32(2.0**exponent), rows.starts, rows.lengths)  # type: ignore[attr-defined]
    means = (sums // rows.lengths) * 2.0**-exponent
    octaves = np.log2(np.maximum(means, means.max() * 2.0 ** (-tables.MOST / PER_OCTAVE)) / means.max())
    classes = np.minimum(np.rint(-PER_OCTAVE * octaves), tables.MOST - 1).astype(np.int64)
    used, classes = np.unique(classes, return_inverse=True)
    scales = means.max() * 2.0 ** (-used / PER_OCTAVE) / BINS_PER_MEAN
    every = max(1, len(values) >> 20)
    factors = (1 / scales).astype(np.float32)
    sampled = kernel.histogram(values, rows.starts, rows.lengths, classes, factors, every)  # type: ignore[attr-defined]
    sizes = np.bincount(classes, rows.lengths).astype(np.int64)
    return Survey(classes, means, scales, sampled, sizes, np.zeros(len(rows), np.bool_))


class Estimate:
    """Bits and error of every class under every threshold, for any step."""

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        self._moments = [_cumulative(survey.weights * survey.middles**power) for power in range(2)]
        self._last = np.array([np.flatnonzero(row).max(initial=0) + 1 for row in survey.sampled])

    def plan(self, step: float) -> Plan:
        """The best thresholds for a step."""
        (bits, error), alone = self._at(step), self.survey.energies
        worth = error + SLOPE * step * step * bits
        best = np.argmin(worth, axis=1)
        chosen = np.arange(len(best)), best
        kept = worth[chosen] < alone
        thresholds, errors = np.where(kept, THRESHOLDS[best], np.nan), np.where(kept, error[chosen], alone)
        return Plan(step, thresholds, np.where(kept, bits[chosen], 0.0), errors)

    def _at(self, step: float) -> tuple[Floats, Floats]:
        """[classes, thresholds] bits and squared error."""
        widths, sizes = self.survey.scales, self.survey.sizes
        levels = min(LARGEST + 1, int((self._last * widths).max() / step) + 2)
        edges = np.arange(levels)[None, None, :] + THRESHOLDS[None, :, None]
        count, first = (_cells(m, edges * step / widths[:, None, None]) for m in self._moments)
        squares = np.divide(first * first, count, out=np.zeros_like(count), where=count > 0.5)
        error = self.survey.energies[:, None] - squares[:, :, 1:].sum(axis=2)
        share = count / np.maximum(1, sizes)[:, None, None]
        bits = sizes[:, None] * -(share * np.log2(np.maximum(share, 1e-12))).sum(axis=2)
        bits += sizes[:, None] - count[:, :, 0] + ESCAPE_BITS * (count[:, :, -1] if levels > LARGEST else 0)
        return bits + TABLE_BITS + LEVEL_BITS * (count > 0.5).sum(axis=2), error


def _cumulative(weights: Floats) -> Floats:
    return np.concatenate([np.zeros((len(weights), 1)), np.cumsum(weights, axis=1)], axis=1)


def _cells(cumulative: Floats, edges: Floats) -> Floats:
    """What lies below the first edge, between every two, and above the last: bins are taken as flat."""
    at = np.minimum(edges, BINS)
    whole = np.minimum(at.astype(np.int64), BINS - 1)
    rows = np.arange(len(cumulative))[:, None, None]
    below = cumulative[rows, whole]
    below = below + (cumulative[rows, whole + 1] - below) * (at - whole)
    total = np.broadcast_to(cumulative[:, -1][:, None, None], (*below.shape[:2], 1))
    return np.diff(below, axis=2, prepend=0.0, append=total)


def solve(estimate: Estimate, budget: float, finest: float) -> tuple[Plan, Plan]:
    """Two plans a thousandth of an octave apart, the first of at least `budget` bits, the second of at most; no step is
    below `finest`, and if even that one needs fewer bits, it is both."""
    low, high = math.log2(finest), math.log2(float(estimate.survey.means.max())) + 6
    fine, coarse = estimate.plan(2.0**low), estimate.plan(2.0**high)
    if fine.total <= budget:
        return fine, fine
    while high - low > 1e-3:
        middle = (low + high) / 2
        plan = estimate.plan(2.0**middle)
        if plan.total > budget:
            low, fine = middle, plan
        else:
            high, coarse = middle, plan
    return fine, coarse
