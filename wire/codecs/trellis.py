"""Rows quantized along the paths of a trellis, so that they fit into a number of bits: the encoder of `ecsq` with `states`.

What levels cost is learned from a part of each row, and a step is sought for which that part takes its share of the budget; then
all rows are coded, once or twice.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import numpy as np

from wire.codecs import Array, fitting, kernels, prices, rans, rate, tables
from wire.codecs.fitting import ATTEMPTS, CLOSE, Coded, Fit
from wire.codecs.kernels import ESCAPE, LARGEST_LEVEL, SYMBOLS, UNITS, Ints
from wire.codecs.prices import Known
from wire.codecs.rank_rows import RankRows
from wire.codecs.rate import Survey
from wire.delta import Vector

SAMPLE = 1 << 18
"""Entries that are learned from, about."""
LESSONS = 4
RESERVE = 1.2
"""Rows are coded that scalar steps so many times as long as the grid's would send, or those of this budget: at low rates a lesson
that errs would leave out nearly all."""
SEARCHES, NEAR = 12, 0.004
STEEPEST, FLATTEST = -40.0, -0.15
"""Bounds of d log bits / d log step."""
FAR = 0.5
"""Octaves that the step may change at a time."""


def fitted(values: Vector, rows: RankRows, budget: float) -> Coded:
    """`values` in row order in at most `budget` bits, if so few are possible at all."""
    kernel = kernels.fastest(len(values))
    largest = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
    fit = Fit(values, rows, budget, fitting.nothing(rows, len(values)))
    if largest < fitting.SMALLEST:
        return fit.best
    survey = rate.survey(values, largest, rows, kernel)
    finest, goal = largest / LARGEST_LEVEL, budget * (1 + CLOSE) / 2
    sample, step = _taught(values, rows, survey, largest, goal, finest)
    wanted = goal - _beside(sample.classes)
    for _ in range(ATTEMPTS):
        step = sample.step_for(wanted, step, finest)
        made = _along(sample, step)
        if len(made.escapes) > fitting.most_escapes(len(values)):
            finest = max(1.01 * step, fitting.finest_for(values) / 2)
            continue
        fit.offer(made)
        if CLOSE * budget <= made.bits <= budget or (step <= finest and made.bits <= budget):
            break
        wanted += goal - made.bits
    if fit.missed or len(fit.best.escapes):
        _whole(fit, survey, sample, finest)
    return fit.best


def _whole(fit: Fit, survey: Survey, sample: Sample, finest: float) -> None:
    """Offer paths through all rows, and through those that a scalar quantizer would keep. Where many entries have one magnitude
    bits leap as the step passes it, and none gives those that are wanted; and lessons err with levels that have no symbol."""
    scalar = fitting.fitted(fit.values, fit.rows, fit.budget)
    for classes in (survey.classes, np.where(scalar.used < 0, -1, survey.classes)):
        fitting.bisected(fit, functools.partial(_guessing, sample, survey, classes), finest, sample.largest)


def _guessing(sample: Sample, survey: Survey, classes: Ints, step: float) -> Coded:
    """Paths through rows of `classes` by what scalar quantization would make levels cost."""
    return _along(dataclasses.replace(sample, classes=classes, known=prices.guessed(survey, step)), step)


@dataclasses.dataclass(frozen=True, eq=False)
class Sample:
    """The rows, each one's class (-1: left out), what levels cost, and some of the rows, `some`: classes, -1 for all others;
    `worth`: λ."""

    values: Vector
    rows: RankRows
    largest: float
    classes: Ints
    some: Ints
    known: Known
    worth: float

    def search(self, step: float, classes: Ints) -> tuple[Array, Ints, Ints]:
        """As `viterbi.search`."""
        size, (costs, levels) = len(self.values), prices.of(self.known, self.largest / step, self.worth)
        found: tuple[Array, Ints, Ints] = kernels.fastest(size, "viterbi").search(
            self.values, self.rows.starts, self.rows.lengths, classes, _inverse(step), costs, levels, rans.lanes(size)
        )
        return found

    def bits(self, counts: Ints) -> float:
        """Bits of all rows, by what `search` counted in some."""
        kept = self.classes >= 0
        sizes = np.bincount(self.classes[kept], self.rows.lengths[kept], len(counts))
        return float((prices.bits_each(counts) * sizes).sum())

    def step_for(self, wanted: float, step: float, finest: float) -> float:
        """The step for `wanted` bits, by a straight line through the last two, as logarithms, or halfway between bounds."""
        low, high, before, step = math.log2(finest), math.inf, None, max(step, finest)
        for _ in range(SEARCHES):
            bits = self.bits(self.search(step, self.some)[1])
            at = math.log2(step), math.log2(max(bits, 1.0) / max(wanted, 1.0))
            if abs(at[1]) < NEAR or (step <= finest and at[1] < 0):
                break
            low, high = (at[0], high) if at[1] > 0 else (low, at[0])
            slope = -1.0 if before is None or at[0] == before[0] else (at[1] - before[1]) / (at[0] - before[0])
            by = -at[1] / min(max(slope, STEEPEST), FLATTEST)
            following, before = at[0] + min(max(by, -FAR), FAR), at
            step = 2.0 ** (following if low < following < high else (low + min(high, low + 2 * FAR)) / 2)
        return step


def _sampled(survey: Survey, rows: RankRows, classes: Ints) -> Ints:
    """`classes` with -1 for most rows; those of every scale are left, so that their entries are about SAMPLE."""
    order = np.argsort(survey.means, kind="stable")
    kept = order[classes[order] >= 0]
    every = max(1, int(rows.lengths[kept].sum()) // SAMPLE)
    some = kept[every // 2 :: every]
    chosen = np.full_like(classes, -1)
    chosen[some] = classes[some]
    return chosen


def _taught(
    values: Vector, rows: RankRows, survey: Survey, largest: float, goal: float, finest: float
) -> tuple[Sample, float]:
    """A sample with what levels cost in it, and a step for about `goal` bits of all rows."""
    estimate = rate.Estimate(survey)
    scalar = rate.solve(estimate, goal, 2 * finest)[0].step
    step = scalar / 2
    known, worth = prices.guessed(survey, step), prices.worth(goal / len(values))
    for _ in range(LESSONS):
        classes, guess = survey.chosen(estimate.plan(min(step * RESERVE, scalar))), prices.guessed(survey, step)
        sample = Sample(values, rows, largest, classes, _sampled(survey, rows, classes), known, worth)
        _, counts, residuals = sample.search(step, sample.some)
        known = prices.learned(known, guess, counts, residuals)
        step = max(finest, step * min(max((sample.bits(counts) / goal) ** 0.4, 0.8), 1.25))
    return dataclasses.replace(sample, known=known), step


def _beside(classes: Ints) -> float:
    """Bits that tables and classes take, about."""
    _, many = np.unique(classes, return_counts=True)
    return float((many * np.log2(len(classes) / many)).sum()) + 4 * rate.TABLE_BITS * len(many)


def _along(sample: Sample, step: float) -> Coded:
    symbols, counts, residuals = sample.search(step, sample.classes)
    occur, used = fitting.numbered(sample.classes)
    counts, residuals = counts[occur].reshape(-1, SYMBOLS), residuals[occur].reshape(-1, 3)
    places = np.flatnonzero(symbols % SYMBOLS == ESCAPE) if counts[:, ESCAPE].any() else np.zeros(0, np.int64)
    found = tables.of(counts, residuals, used, 2)
    return fitting.coded(np.float32(step), symbols, _escaped(sample.values[places], step), used, found, counts)


def _escaped(values: Vector, step: float) -> Array:
    """Where entries lie that have no symbol, in steps, int16."""
    units = np.minimum(np.abs(values) * _inverse(step), np.float32(LARGEST_LEVEL * UNITS)).astype(np.int64)
    found: Array = np.copysign((units + UNITS // 2) // UNITS, values).astype(np.int16)
    return found


def _inverse(step: float) -> np.float32:
    return np.float32(UNITS) / np.float32(step)
