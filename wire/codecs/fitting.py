"""Rows quantized so that they fit into a number of bits: the encoder of `ecsq` that takes each entry by itself."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from wire.codecs import Array, kernels, rans, rate, tables
from wire.codecs.kernels import SYMBOLS, UNITS, Ints, Words
from wire.codecs.rank_rows import RankRows
from wire.codecs.rate import Plan
from wire.codecs.tables import Tables
from wire.delta import Vector

CLOSE = 0.98
"""An update has this part of its target at least, if there is so much to tell."""
ATTEMPTS = 8
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


def fitted(values: Vector, rows: RankRows, budget: float) -> Coded:
    """`values` in row order in at most `budget` bits, if so few are possible at all."""
    kernel = kernels.fastest(len(values))
    largest = max(float(values.max(initial=0.0)), -float(values.min(initial=0.0)))
    best = nothing(rows, len(values))
    if largest < SMALLEST:
        return best
    survey = rate.survey(values, largest, rows, kernel)
    finest, goal = largest * 2.0**-15, budget * (1 + CLOSE) / 2
    estimate, wanted = rate.Estimate(survey), goal
    for _ in range(ATTEMPTS):
        fine, coarse = rate.solve(estimate, wanted, finest)
        jumps = coarse.total < CLOSE * fine.total
        classes = survey.fitted(fine, wanted, rows) if jumps else survey.chosen(fine)
        made = _by_plan(values, rows, classes, fine, kernel)
        if len(made.escapes) > most_escapes(len(values)):
            finest = 2 * fine.step
            continue
        if best.bits < made.bits <= budget:
            best = made
        if CLOSE * budget <= made.bits <= budget or fine is coarse:
            break
        wanted *= goal / made.bits if made.bits else 1.0
        if jumps and made.bits < budget:
            survey = survey.without(classes < 0, rows)  # what is too little for one more row goes into a finer step
            estimate, wanted = rate.Estimate(survey), goal
    return best


def _by_plan(values: Vector, rows: RankRows, classes: Ints, plan: Plan, kernel: Any) -> Coded:
    known, used = numbered(classes)
    offsets, step = UNITS - np.rint(plan.thresholds[known] * UNITS).astype(np.int64), np.float32(plan.step)
    symbols, escapes, counts, residuals = kernel.quantize(
        values, rows.starts, rows.lengths, used, np.float32(UNITS) / step, offsets
    )
    return coded(step, symbols, escapes, used, tables.of(counts, residuals, used), counts)


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
