"""`viterbi`, compiled: as `kernels_numba`. The paths of 32 lanes are followed at once, in loops that are vectorized."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from wire.codecs.kernels import ESCAPE, SYMBOLS, UNITS, Ints
from wire.codecs.kernels_numba import BOTTOM, ONE, SLOTS, U12, U16, U24
from wire.codecs.viterbi import BIN_BITS, HIGHEST, PATHS

ROOM = 32
"""Lanes for which there is room: what is known of state s in lane l is at ROOM · s + l."""
FAR = np.int32(1 << 29)
S1, S2, S3, S4, S5, S6, S7 = (ROOM * state for state in range(1, PATHS))


def _better(first: Any, second: Any) -> Any:
    """The smaller of two costs, which are compared modulo 2^32, and whether it is the second."""
    second_is = np.int32(second - first) < 0
    return (second if second_is else first), np.int32(second_is)


def _step(best: Any, price: Any, chosen: Any, count: Any) -> None:
    """One level further in `count` lanes. `best` int32 [PATHS · ROOM], `price` int32 [4 · ROOM], `chosen`: a bit a state."""
    for lane in range(count):
        b0, b1, b2, b3 = best[lane], best[S1 + lane], best[S2 + lane], best[S3 + lane]
        b4, b5, b6, b7 = best[S4 + lane], best[S5 + lane], best[S6 + lane], best[S7 + lane]
        even, odd, zero, one = price[lane], price[S1 + lane], price[S2 + lane], price[S3 + lane]
        best[lane], c0 = better(np.int32(b0 + even), np.int32(b4 + odd))
        best[S1 + lane], c1 = better(np.int32(b2 + even), np.int32(b6 + odd))
        best[S2 + lane], c2 = better(np.int32(b4 + even), np.int32(b0 + odd))
        best[S3 + lane], c3 = better(np.int32(b6 + even), np.int32(b2 + odd))
        best[S4 + lane], c4 = better(np.int32(b3 + zero), np.int32(b7 + one))
        best[S5 + lane], c5 = better(np.int32(b1 + zero), np.int32(b5 + one))
        best[S6 + lane], c6 = better(np.int32(b7 + zero), np.int32(b3 + one))
        best[S7 + lane], c7 = better(np.int32(b5 + zero), np.int32(b1 + one))
        low, high = c0 | c1 << 1 | c2 << 2 | c3 << 3, c4 << 4 | c5 << 5 | c6 << 6 | c7 << 7
        chosen[lane] = np.uint8(low | high)


def _forward(bins: Any, starts: Any, lengths: Any, tables: Any, costs: Any, lanes: Any, chosen: Any) -> Any:
    """`chosen` uint8 [groups, lanes] is filled; the cheapest state of each lane at the end."""
    best, price = np.full(PATHS * ROOM, FAR, np.int32), np.zeros(4 * ROOM, np.int32)
    best[:lanes] = 0
    group = 0
    for row in range(starts.size):
        if tables[row] < 0:
            continue
        of_row = costs[tables[row]]
        for first in range(starts[row], starts[row] + lengths[row], lanes):
            some = bins[first : min(first + lanes, starts[row] + lengths[row])]
            for lane in range(some.size):
                each = of_row[some[lane]]
                price[lane], price[S1 + lane] = each[0], each[1]
                price[S2 + lane], price[S3 + lane] = each[2], each[3]
            if some.size == ROOM:
                step(best, price, chosen[group], ROOM)
            else:
                step(best, price, chosen[group], some.size)
            group += 1
    last = np.zeros(lanes, np.int32)
    for lane in range(lanes):
        for state in range(1, PATHS):
            if np.int32(best[ROOM * state + lane] - best[ROOM * last[lane] + lane]) < 0:
                last[lane] = state
    return last


def _back_step(state: Any, chosen: Any, ways: Any, count: Any) -> None:
    """One level back in `count` lanes; `ways` uint8: 2 · quantizer + parity."""
    for lane in range(count):
        to = state[lane]
        odd, parity = to >> 2, (np.int32(chosen[lane]) >> to) & 1
        ways[lane] = np.uint8(odd << 1 | parity)
        state[lane] = ((to & 3) ^ odd ^ parity << 1) << 1 | odd


def _back(
    values: Any,
    bins: Any,
    starts: Any,
    lengths: Any,
    tables: Any,
    inverse: Any,
    levels: Any,
    chosen: Any,
    state: Any,
    symbols: Any,
) -> Any:
    """Along the cheapest paths from their ends; `symbols` is filled."""
    lanes, group = state.size, chosen.shape[0]
    counts = np.zeros((levels.shape[0], 4, 2 * SYMBOLS), np.int64)
    residuals = np.zeros((levels.shape[0], 2, 3), np.int64)
    found, units = np.empty(lengths.max(), np.int32), np.empty(lengths.max(), np.int32)
    ways = np.empty(lengths.max(), np.uint8)
    for row in range(starts.size - 1, -1, -1):
        table, size = tables[row], lengths[row]
        if table < 0:
            continue
        of_row, count = levels[table].reshape(-1), counts[table]
        x, mine = values[starts[row] : starts[row] + size], symbols[starts[row] : starts[row] + size]
        of_bin = bins[starts[row] : starts[row] + size]
        for first in range((size - 1) // lanes * lanes, -1, -lanes):
            group -= 1
            some = ways[first : min(first + lanes, size)]
            if some.size == ROOM:
                back_step(state, chosen[group], some, ROOM)
            else:
                back_step(state, chosen[group], some, some.size)
        for i in range(size):
            found[i] = of_row[4 * np.int32(of_bin[i]) + ways[i]]
        for i in range(size):
            level, odd = found[i], np.int32(ways[i] >> ONE_BYTE)
            signed = 1 if (x[i] > 0) & (level > 0) else 0
            mine[i] = SYMBOLS * odd + min(2 * level - signed, ESCAPE)
            units[i] = np.int32(min(abs(x[i]) * inverse, HIGHEST)) - UNITS * (2 * level - odd)
            found[i] = min(level, 3) << 1 | odd
        for key in range(2, 8):
            total = np.int64(0)
            for i in range(size):
                total += units[i] if found[i] == key else 0
            residuals[table, key & 1, (key >> 1) - 1] += total
        for i in range(size):
            count[i & 3, mine[i]] += 1
    return counts, residuals


def _bins(values: Any, starts: Any, lengths: Any, tables: Any, inverse: Any, last: Any, bins: Any) -> Any:
    """`bins` of the rows that are not left out."""
    for row in range(starts.size):
        if tables[row] < 0:
            continue
        x, mine = values[starts[row] : starts[row] + lengths[row]], bins[starts[row] : starts[row] + lengths[row]]
        for i in range(x.size):
            mine[i] = min(np.int32(min(abs(x[i]) * inverse, HIGHEST)) >> BIN_BITS, last)


def _decode(
    words: Any,
    at: Any,
    states: Any,
    paths: Any,
    lookup: Any,
    values: Any,
    starts: Any,
    lengths: Any,
    tables: Any,
    out: Any,
) -> Any:
    """As `kernels_numba.decode`."""
    lanes, padding = states.size, 0
    for row in range(lengths.size):
        padding = max(padding, lengths[row])
    for row in range(starts.size):
        if tables[row] < 0:
            continue
        table, value, start = lookup[tables[row]], values[tables[row]], starts[row]
        for first in range(0, lengths[row], lanes):
            mine = out[start + first : start + min(first + lanes, lengths[row])]
            for lane in range(mine.size):
                state, path = states[lane], np.uint32(paths[lane])
                odd = path & ONE
                found = table[(odd << U12) | (state & SLOTS)]
                moved = np.uint32((((found >> U12) & SLOTS) + ONE) * (state >> U12) + (found & SLOTS))
                word, low = np.uint32(words[at]), moved < BOTTOM
                states[lane] = np.uint32((moved << U16) | word) if low else moved
                at += np.int64(low)
                symbol = found >> U24
                paths[lane] = np.uint8((path >> ONE) ^ (odd | odd << TWO) ^ ((symbol + ONE) & TWO))
                mine[lane] = value[(odd << EIGHT) | symbol]
        if at >= words.size - padding:
            return -1
    return at


TWO, EIGHT, ONE_BYTE = np.uint32(2), np.uint32(8), np.uint8(1)
_compiled = numba.njit(cache=True, nogil=True)
better = _compiled(_better)
step = _compiled(_step)
back_step = _compiled(_back_step)
decode = _compiled(_decode)
_forwarded = _compiled(_forward)
_traced = _compiled(_back)
_binned = _compiled(_bins)


def search(
    values: Any, starts: Ints, lengths: Ints, tables: Ints, inverse: Any, costs: Any, levels: Any, lanes: int
) -> Any:
    """As `viterbi.search`."""
    bins, symbols = np.empty(values.size, np.int16), np.zeros(values.size, np.uint16)
    kept = tables >= 0
    _binned(values, starts, lengths, tables, inverse, np.int32(costs.shape[1] - 1), bins)
    chosen = np.empty((int((-(-lengths[kept] // lanes)).sum()), lanes), np.uint8)
    last = _forwarded(bins, starts, lengths, tables, costs, lanes, chosen)
    counts, residuals = _traced(values, bins, starts, lengths, tables, inverse, levels, chosen, last, symbols)
    return symbols, counts.sum(axis=1), residuals
