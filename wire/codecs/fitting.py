"""Rows quantized so that they fit into a number of bits: the encoder of `ecsq` that takes each entry by itself."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from wire.codecs import Array, kernels, rans, rate, tables
from wire.codecs.kernels import LARGEST, SYMBOLS, UNITS, Ints, Words
from wire.codecs.rank_rows import RankRows
from wire.codecs.rate import Floats
from wire.codecs.tables import Tables
from wire.delta import Vector

CLOSE = 0.98
"""An update has this part of its target at least, if there is so much to tell."""
ATTEMPTS = 8
HALVINGS = 14
DEAD_ZONE = 0.6
"""From which part of a step on an entry is sent, where every row is."""
SMALLEST = 2.0**-100
"""Where no entry is larger, nothing is sent."""


@dataclasses.dataclass(frozen=True, eq=False)
class Coded:
    """Quantized rows: their symbols (of the second quantizer SYMBOLS more), the levels that have none, each row's class (-1: left
    out), and what all of it takes."""

    step: np.float32
    symbols: Array
    escapes: Array
    used: Ints
    tables: Tables
    classes: Words
    bits: float

    def words(self, rows: RankRows) -> Words:
        """The coded symbols."""
        size = len(self.symbols)
        frequencies = self.tables.frequencies.reshape(-1, self.tables.quantizers * SYMBOLS)
        words: Words = kernels.fastest(size).encode(
            self.symbols, rows.starts, rows.lengths, self.used, frequencies, rans.lanes(size)
        )
        return words


@dataclasses.dataclass
class Fit:
    """The best of what has been tried and takes at most `budget` bits: the one that errs least. Among those of plans made for the
    budget (`plain`) it is the longest, which need not be measured: measuring takes longer than coding."""

    values: Vector
    rows: RankRows
    budget: float
    best: Coded
    plain: bool = True

    @property
    def missed(self) -> bool:
        """Whether much of the budget is left."""
        return self.best.bits < CLOSE * self.budget

    def offer(self, made: Coded, plain: bool = True) -> None:
        """Take it if it is better."""
        if made.bits > self.budget or len(made.escapes) > most_escapes(len(self.values)):
            return
        if not self.best.bits or (plain and self.plain):
            better = made.bits > self.best.bits
        else:
            better = error(made, self.values, self.rows) < error(self.best, self.values, self.rows)
        if better:
            self.best, self.plain = made, plain


def fitted(values: Vector, rows: RankRows, budget: float) -> Coded:
    """`values` in row order in at most `budget` bits, if so few are possible at all."""
    kernel = kernels.fastest(len(values))
    largest = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
    fit = Fit(values, rows, budget, nothing(rows, len(values)))
    if largest < SMALLEST:
        return fit.best
    survey = rate.survey(values, largest, rows, kernel)
    finest, goal = largest * 2.0**-15, budget * (1 + CLOSE) / 2
    estimate, wanted = rate.Estimate(survey), goal
    for _ in range(ATTEMPTS):
        fine, coarse = rate.solve(estimate, wanted, finest)
        jumps = coarse.total < CLOSE * fine.total
        classes, plan = survey.fitted(fine, wanted, rows) if jumps else survey.chosen(fine), fine
        if jumps and survey.error(coarse, survey.chosen(coarse), rows) < survey.error(fine, classes, rows):
            classes, plan = survey.chosen(coarse), coarse  # fewer bits err less than rows left out
        made = _quantized(values, rows, classes, plan.step, plan.thresholds, kernel)
        if len(made.escapes) > most_escapes(len(values)):
            finest = max(1.01 * plan.step, finest_for(values))
            continue
        fit.offer(made, plain=plan is fine)
        if CLOSE * budget <= made.bits <= budget or plan is coarse:
            break
        wanted *= goal / made.bits if made.bits else 1.0
        if jumps and made.bits < budget:
            survey = survey.without(classes < 0, rows)  # what is too little for one more row goes into a finer step
            estimate, wanted = rate.Estimate(survey), goal
    if fit.missed:
        every = np.full(len(survey.scales), DEAD_ZONE)
        for rest in (survey.classes, classes):
            made_at = functools.partial(_quantized, values, rows, rest, thresholds=every, kernel=kernel)
            bisected(fit, made_at, finest, largest)
    return fit.best


def bisected(fit: Fit, made: Callable[[float], Coded], finest: float, largest: float) -> None:
    """Offer what the finest step gives that goes into the budget."""
    low, high = math.log2(finest), math.log2(2 * largest)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        tried = made(2.0**middle)
        fit.offer(tried, plain=False)
        fits = tried.bits <= fit.budget and len(tried.escapes) <= most_escapes(len(fit.values))
        low, high = (low, middle) if fits else (middle, high)


def finest_for(values: Vector) -> float:
    """The step from which on no more entries than may be have no symbol."""
    kept = len(values) - most_escapes(len(values))
    return float(np.partition(np.abs(values), kept)[kept]) / LARGEST if kept > 0 else 0.0


def error(made: Coded, values: Vector, rows: RankRows) -> float:
    """The squared error of what would be decoded, without the centroids of levels that have no symbol."""
    if not len(made.tables.frequencies):
        return float(np.square(values, dtype=np.float64).sum())
    meant = made.tables.by_class(made.tables.values(made.step))
    classes = np.repeat(made.used, rows.lengths)
    found = np.where(classes < 0, np.float32(0), meant[classes, made.symbols])
    escapes = np.flatnonzero(np.isnan(found))
    found[escapes] = made.step * made.escapes.astype(np.float32)
    return float(np.square(found - values, dtype=np.float64).sum())


def _quantized(values: Vector, rows: RankRows, classes: Ints, step: float, thresholds: Floats, kernel: Any) -> Coded:
    """Rows of `classes` (-1: left out), each with its threshold."""
    known, used = numbered(classes)
    offsets, wide = UNITS - np.rint(thresholds[known] * UNITS).astype(np.int64), np.float32(step)
    symbols, escapes, counts, residuals = kernel.quantize(
        values, rows.starts, rows.lengths, used, np.float32(UNITS) / wide, offsets
    )
    return coded(wide, symbols, escapes, used, tables.of(counts, residuals, used), counts)


def most_escapes(size: int) -> int:
    """So many levels without a symbol an update may have."""
    return size // 16 + 1


def nothing(rows: RankRows, size: int) -> Coded:
    """Every row left out."""
    used, none = np.full(len(rows), -1), np.zeros(0, np.int64)
    found = tables.of(none.reshape(0, SYMBOLS), none.reshape(0, 3), used)
    classes, escapes = tables.coded_rows(found, used, size), np.zeros(0, np.int16)
    return Coded(np.float32(0), np.zeros(size, np.uint8), escapes, used, found, classes, 0.0)


def numbered(classes: Ints) -> tuple[Ints, Ints]:
    """The classes that occur, and which of these each row has (-1: left out)."""
    known, used = np.unique(np.append(classes, -1), return_inverse=True)
    return known[1:], used[:-1] - 1


def coded(step: np.float32, symbols: Array, escapes: Array, used: Ints, found: Tables, counts: Ints) -> Coded:
    """What is known of quantized rows, with all that it takes; `counts` [tables, SYMBOLS]."""
    size = len(symbols)
    classes = tables.coded_rows(found, used, size)
    sent = sum(rans.cost(f, c) for f, c in zip(found.frequencies, counts, strict=True))
    beside = 8 * len(found.to_bytes()) + 16 * (len(classes) + len(escapes)) + 32 * rans.lanes(size)
    return Coded(step, symbols, escapes, used, found, classes, sent + beside)
