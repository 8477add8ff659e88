"""The loops of trellis-coded quantization in numpy. `viterbi_numba` has the same ones compiled; both give the same bits.

Two quantizers take turns: that of even multiples of the step, 2 k, and that of odd ones and zero, 2 k - sign(k). Which one is
next follows from whether the levels before are odd, by a path through eight states (Marcellin and Fischer 1990; Ungerboeck's
code): state s has quantizer s & 1, a level of parity p leads to (s >> 1) ^ 5 (s & 1) ^ 2 p. So a decoder knows which is meant,
and an encoder that compares paths gets most of the error of steps half as long. Every lane of the coder is a path of its own.

A *bin* is a magnitude in units of 1/16 of a step, at most `bins` - 1. `costs` int32 [tables, bins, 4] and `levels` uint8 [tables,
bins, 4] say for each, by 2 · quantizer + parity, what the best such level costs and which it is; 128 is the escape. Costs along a
path are compared modulo 2^32: those of paths to different states are never far from each other.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from wire.codecs.kernels import ESCAPE, LARGEST_LEVEL, LOWEST, PRECISION, SYMBOLS, TOTAL, UNITS, Ints, States, Words
from wire.delta import Vector

PATHS = 8
"""States of the trellis."""
BIN_BITS = 4
"""A bin is units >> 4: 1/16 of a step."""
HIGHEST = np.float32(LARGEST_LEVEL * UNITS)
_TO = np.arange(PATHS)
QUANTIZER = _TO >> 2
"""Of the states that lead to each state, their quantizer: it is the same for both."""
BEFORE = np.stack([(((_TO & 3) ^ QUANTIZER ^ (2 * parity)) << 1) | QUANTIZER for parity in (0, 1)])
"""The state before each state [parity, state]."""


def search(
    values: Vector,
    starts: Ints,
    lengths: Ints,
    tables: Ints,
    inverse: np.float32,
    costs: npt.NDArray[np.int32],
    levels: npt.NDArray[np.uint8],
    lanes: int,
) -> tuple[npt.NDArray[np.uint16], Ints, Ints]:
    """The cheapest symbols of all rows, uint16 [size]: 256 · quantizer + symbol, 0 in rows that are left out.

    Also counted, for each table: how often each comes, int64 [tables, 2 · SYMBOLS], and the sum of unit - UNITS · position over
    levels of 1, of 2 and above for each quantizer, int64 [tables, 2, 3]."""
    kept = np.flatnonzero(tables >= 0)
    bins = np.minimum(np.abs(values) * inverse, HIGHEST).astype(np.int32) >> BIN_BITS
    bins = np.minimum(bins, costs.shape[1] - 1)
    chosen = _forward(bins, starts, lengths, tables, kept, costs, lanes)
    symbols, counts = np.zeros(len(values), np.uint16), np.zeros((len(costs), 2 * SYMBOLS), np.int64)
    residuals = np.zeros((len(costs), 2, 3), np.int64)
    state = chosen.pop()
    for row in kept[::-1]:
        mine, size, table = slice(starts[row], starts[row] + lengths[row]), int(lengths[row]), tables[row]
        found, quantizer = np.empty(size, np.int64), np.empty(size, np.int64)
        for j in range((size - 1) // lanes * lanes, -1, -lanes):
            count = min(lanes, size - j)
            to, some = state[:count], slice(j, j + count)
            parity = chosen.pop()[to, np.arange(count)].astype(np.int64)
            quantizer[some] = QUANTIZER[to]
            found[some] = levels[table, bins[mine][some], 2 * quantizer[some] + parity]
            state[:count] = BEFORE[parity, to]
        row_values, signed = values[mine], found > 0
        symbol = np.minimum(2 * found - ((row_values > 0) & signed), ESCAPE)
        symbols[mine] = SYMBOLS * quantizer + symbol
        counts[table] += np.bincount(symbols[mine], minlength=2 * SYMBOLS)
        units = np.minimum(np.abs(row_values) * inverse, HIGHEST).astype(np.int64) - UNITS * (2 * found - quantizer)
        np.add.at(residuals[table], (quantizer[signed], np.minimum(found[signed], 3) - 1), units[signed])
    return symbols, counts, residuals


def _forward(
    bins: npt.NDArray[np.int32],
    starts: Ints,
    lengths: Ints,
    tables: Ints,
    kept: Ints,
    costs: npt.NDArray[np.int32],
    lanes: int,
) -> list[Any]:
    """For each group of entries, of the best path to every state the parity of its last level [states, lanes]; last the best
    state at the end."""
    best = np.full((PATHS, lanes), 1 << 29, np.int32)
    best[0] = 0
    chosen: list[Any] = []
    even, odd = 2 * QUANTIZER, 2 * QUANTIZER + 1
    with np.errstate(over="ignore"):
        for row in kept:
            of_row = costs[tables[row]][bins[starts[row] : starts[row] + lengths[row]]].T
            for j in range(0, int(lengths[row]), lanes):
                some = of_row[:, j : j + lanes]
                count = some.shape[1]
                first, second = best[BEFORE[0], :count] + some[even], best[BEFORE[1], :count] + some[odd]
                better = (second - first) < 0
                best[:, :count] = np.where(better, second, first)
                chosen.append(better)
        chosen.append(np.argmin(best - best[0], axis=0))
    return chosen


def decode(
    words: Words,
    at: int,
    states: States,
    paths: npt.NDArray[np.uint8],
    lookup: States,
    values: Any,
    starts: Ints,
    lengths: Ints,
    tables: Ints,
    out: Any,
) -> int:
    """As `kernels.decode`, with two tables a row, `lookup` [tables, 2 · TOTAL] and `values` [tables, 2 · SYMBOLS], and the states
    `paths` uint8 [lanes] that say which; they are advanced, too."""
    lanes, state, padding = len(states), states.astype(np.int64), int(lengths.max(initial=0))
    path = paths.astype(np.int64)
    for row in np.flatnonzero(tables >= 0):
        table, value = lookup[tables[row]].astype(np.int64), values[tables[row]]
        for j in range(0, int(lengths[row]), lanes):
            count = min(lanes, int(lengths[row]) - j)
            quantizer = path[:count] & 1
            found = table[TOTAL * quantizer + (state[:count] & (TOTAL - 1))]
            moved = (((found >> 12) & 4095) + 1) * (state[:count] >> PRECISION) + (found & 4095)
            low = np.flatnonzero(moved < LOWEST)
            moved[low] = (moved[low] << 16) | words[at : at + len(low)]
            at += len(low)
            state[:count] = moved
            symbol = found >> 24
            path[:count] = (path[:count] >> 1) ^ (5 * quantizer) ^ (symbol + 1 & 2)
            out[starts[row] + j : starts[row] + j + count] = value[SYMBOLS * quantizer + symbol]
        if at >= len(words) - padding:
            return -1
    states[:], paths[:] = state, path
    return at
