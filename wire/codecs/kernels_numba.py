"""`kernels`, compiled: serial, without the interpreter's lock, cached on disk. No fast arithmetic: bits are a promise."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from wire.codecs.kernels import (
    BINS,
    ESCAPE,
    LARGEST,
    LARGEST_LEVEL,
    LOWEST,
    PRECISION,
    SYMBOLS,
    TOTAL,
    UNITS,
    Ints,
    States,
    Words,
    cumulative,
)

FOUR, LOW_HALF = np.uint8(4), np.uint8(15)
EIGHT = np.int32(8)
PIECE = 1 << 12
"""Codes unpacked at a time, so that they stay in the nearest cache."""
HIGHEST = np.float32(LARGEST_LEVEL * UNITS)
LAST_BIN = np.float32(BINS - 1)
U12, U16, U20, U24 = np.uint32(12), np.uint32(16), np.uint32(32 - PRECISION), np.uint32(24)
SLOTS, LOW_WORD, BOTTOM, ONE = np.uint32(TOTAL - 1), np.uint32(0xFFFF), np.uint32(LOWEST), np.uint32(1)


def _sums(values: Any, factor: Any, starts: Any, lengths: Any) -> Any:
    total = np.empty(starts.size, np.int64)
    for row in range(starts.size):
        found, x = np.int64(0), values[starts[row] : starts[row] + lengths[row]]
        for i in range(x.size):
            found += np.int64(np.int32(abs(x[i]) * factor))
        total[row] = found
    return total


def _histogram(values: Any, starts: Any, lengths: Any, classes: Any, factors: Any, every: Any) -> Any:
    counts = np.zeros((factors.size, BINS), np.int64)
    for row in range(starts.size):
        mine, factor = counts[classes[row]], factors[classes[row]]
        x = values[starts[row] : starts[row] + lengths[row]]
        for i in range(0, x.size, every):
            mine[np.int32(min(abs(x[i]) * factor, LAST_BIN))] += 1
    return counts


def _quantize(values: Any, starts: Any, lengths: Any, tables: Any, inverse: Any, offsets: Any, escapes: Any) -> Any:
    """A row at a time, in loops that are short enough to be vectorized; symbols are counted in four places in turn, since adding
    to the same one twice in a row would wait for memory."""
    symbols = np.zeros(values.size, np.uint8)
    counts = np.zeros((offsets.size, 4, SYMBOLS), np.int64)
    residuals = np.zeros((offsets.size, 3), np.int64)
    units, levels = np.empty(lengths.max(), np.int32), np.empty(lengths.max(), np.int32)
    escaped = 0
    for row in range(starts.size):
        table = tables[row]
        if table < 0:
            continue
        offset, count, size = np.int32(offsets[table]), counts[table], lengths[row]
        x, mine, most = values[starts[row] : starts[row] + size], symbols[starts[row] : starts[row] + size], np.int32(0)
        for i in range(size):
            units[i] = np.int32(min(abs(x[i]) * inverse, HIGHEST))
        for i in range(size):
            level: Any = units[i] + offset
            level = min(max(level, 0) >> 8, LARGEST_LEVEL)
            levels[i] = level
            most = max(most, level)
            mine[i] = 2 * level - (1 if (x[i] > 0) & (level > 0) else 0)
        for i in range(size):
            units[i] -= UNITS * levels[i]
        first, second, every = np.int64(0), np.int64(0), np.int64(0)
        for i in range(size):
            first += units[i] if levels[i] == 1 else 0
            second += units[i] if levels[i] == 2 else 0
            every += units[i] if levels[i] > 0 else 0
        residuals[table, 0] += first
        residuals[table, 1] += second
        residuals[table, 2] += every - first - second
        for i in range(size if most > LARGEST else 0):
            if levels[i] > LARGEST:
                escapes[escaped] = levels[i] if x[i] > 0 else -levels[i]
                escaped += 1
                mine[i] = ESCAPE
        for i in range(size):
            count[i & 3, mine[i]] += 1
    return symbols, escaped, counts, residuals


def _encode(
    symbols: Any, starts: Any, lengths: Any, tables: Any, frequencies: Any, cumulative: Any, states: Any, words: Any
) -> Any:
    """Words from the end of `words` backwards; how far they go.

    A quotient is a product with a reciprocal: state + 1/2 is at least 2^-13 of a step away from where the quotient changes, and
    float64 is off by 2^-19 of one at most.
    """
    lanes, at = states.size, words.size
    reciprocals = 1.0 / np.maximum(frequencies, 1).astype(np.float64)
    for row in range(starts.size - 1, -1, -1):
        if tables[row] < 0:
            continue
        frequency, before, start = frequencies[tables[row]], cumulative[tables[row]], starts[row]
        reciprocal, lane = reciprocals[tables[row]], (lengths[row] - 1) % lanes
        for j in range(lengths[row] - 1, -1, -1):
            state, symbol = states[lane], symbols[start + j]
            width = frequency[symbol]
            full = state >= np.uint64(width) << np.uint64(20)
            words[at - 1] = np.uint16(state & LOW_WORD)
            at -= np.int64(full)
            state = state >> U16 if full else state
            share = np.uint32((np.float64(state) + 0.5) * reciprocal[symbol])
            states[lane] = np.uint32((share << U12) + np.uint32(state - share * width) + before[symbol])
            lane = lane - 1 if lane > 0 else lanes - 1
    return at


def _decode(
    words: Any, at: Any, states: Any, lookup: Any, values: Any, starts: Any, lengths: Any, tables: Any, out: Any
) -> Any:
    """Every symbol reads the next word, whether it takes it or not: a branch that cannot be foreseen costs more."""
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
                state = states[lane]
                found = table[state & SLOTS]
                moved = np.uint32((((found >> U12) & SLOTS) + ONE) * (state >> U12) + (found & SLOTS))
                word, low = np.uint32(words[at]), moved < BOTTOM
                states[lane] = np.uint32((moved << U16) | word) if low else moved
                at += np.int64(low)
                mine[lane] = value[found >> U24]
        if at >= words.size - padding:
            return -1
    return at


def _escaped(part: Any, starts: Any, lengths: Any, tables: Any, shifts: Any, step: Any, levels: Any, at: Any) -> Any:
    for row in range(starts.size):
        mine, missing = part[starts[row] : starts[row] + lengths[row]], np.int64(0)
        for i in range(mine.size):
            missing += mine[i] != mine[i]
        for i in range(mine.size if missing > 0 else 0):
            if mine[i] == mine[i]:
                continue
            if at >= levels.size or levels[at] == 0:
                return np.int64(-1)
            level = np.int64(levels[at])
            magnitude = np.float32(abs(level) + shifts[tables[row]])
            mine[i] = step * (magnitude if level > 0 else -magnitude)
            at += 1
    return at


def _reflect(rows: Any, normal: Any) -> None:
    squares: Any = np.int64(0)
    for i in range(normal.size):
        squares += np.int64(normal[i]) * np.int64(normal[i])
    factor = np.float32(2.0 / squares)
    total = np.zeros(rows.shape[1], np.float32)
    for i in range(rows.shape[0]):
        number, row = np.float32(normal[i]), rows[i]
        for j in range(row.size):
            total[j] += number * row[j]
    for j in range(total.size):
        total[j] *= factor
    for i in range(rows.shape[0]):
        number, row = np.float32(normal[i]), rows[i]
        for j in range(row.size):
            row[j] -= number * total[j]


def _turn_back(rows: Any, entries: Any, top: Any, many: Any) -> None:
    end, normal = entries.size, np.empty(rows.shape[0], np.int8)
    for number in range(many - 1, -1, -1):
        mine = normal[: rows.shape[0] - number]
        mine[0], mine[1:] = top, entries[end - mine.size + 1 : end]
        reflect(rows[number:], mine)
        end -= mine.size - 1


def _add(total: Any, values: Any, scale: Any, weight: Any) -> None:
    for i in range(total.shape[0]):
        for j in range(total.shape[1]):
            total[i, j] += np.int64(np.int32(np.rint(values[i, j] * scale))) * weight


def _add_bytes(total: Any, codes: Any, units: Any, block: Any) -> Any:
    least: Any = np.int8(0)
    for first in range(0, codes.size, block):
        unit, mine, some = units[first // block], total[first : first + block], codes[first : first + block]
        for i in range(some.size):
            mine[i] += np.int64(some[i]) * unit
        for i in range(some.size):
            least = min(least, some[i])
    return least


def _unpack(packed: Any, codes: Any) -> Any:
    """Two codes a byte, the earlier in the high half. The smallest."""
    least: Any = LOW_HALF
    for i in range(packed.size):
        high, low = np.uint8(packed[i] >> FOUR), np.uint8(packed[i] & LOW_HALF)
        codes[2 * i], codes[2 * i + 1] = high, low
        least = min(least, min(high, low))
    return least


def _add_nibbles(total: Any, packed: Any, units: Any, block: Any) -> Any:
    """A piece at a time, in loops that are short enough to be vectorized: codes first, then products block by block. A product
    of two numbers of 32 bits has 64 and is one instruction; one of two of 64 is several."""
    codes, least = np.empty(PIECE, np.uint8), LOW_HALF
    for first in range(0, total.size, PIECE):
        least, end = (
            min(least, unpack(packed[first // 2 : (first + PIECE) // 2], codes)),
            min(first + PIECE, total.size),
        )
        for number in range(first // block, (end - 1) // block + 1):
            start = max(first, number * block)
            mine, unit = total[start : min(end, (number + 1) * block)], units[number]
            part, narrow = codes[start - first : start - first + mine.size], np.int32(unit)
            if narrow == unit:
                for i in range(mine.size):
                    mine[i] += np.int64((np.int32(part[i]) - EIGHT) * narrow)
            else:
                for i in range(mine.size):
                    mine[i] += (np.int64(part[i]) - 8) * unit
    return np.int64(least) - 8


def _add_levels(total: Any, packed: Any, scales: Any, block: Any, levels: Any, scale: Any, weight: Any) -> None:
    codes, units = np.empty(PIECE, np.uint8), np.empty(16, np.int64)
    for first in range(0, total.size, PIECE):
        end = min(first + PIECE, total.size)
        unpack(packed[first // 2 : (first + PIECE) // 2], codes)
        for number in range(first // block, (end - 1) // block + 1):
            start = max(first, number * block)
            mine = total[start : min(end, (number + 1) * block)]
            part = codes[start - first : start - first + mine.size]
            for code in range(16):
                units[code] = np.int64(np.int32(np.rint(levels[code] * scales[number] * scale))) * weight
            for i in range(mine.size):
                mine[i] += units[part[i]]


_compiled = numba.njit(cache=True, nogil=True)
sums = _compiled(_sums)
histogram = _compiled(_histogram)
decode = _compiled(_decode)
escaped = _compiled(_escaped)
reflect = _compiled(_reflect)
turn_back = _compiled(_turn_back)
add = _compiled(_add)
unpack = _compiled(_unpack)
add_bytes = _compiled(_add_bytes)
add_nibbles = _compiled(_add_nibbles)
add_levels = _compiled(_add_levels)
_quantized = _compiled(_quantize)
_encoded = _compiled(_encode)


def quantize(values: Any, starts: Ints, lengths: Ints, tables: Ints, inverse: Any, offsets: Ints) -> Any:
    """As `kernels.quantize`."""
    escapes = np.empty(values.size, np.int16)
    symbols, escaped, counts, residuals = _quantized(values, starts, lengths, tables, inverse, offsets, escapes)
    return symbols, escapes[:escaped].copy(), counts.sum(axis=1), residuals


def encode(symbols: Any, starts: Ints, lengths: Ints, tables: Ints, frequencies: Ints, lanes: int) -> Words:
    """As `kernels.encode`."""
    states: States = np.full(lanes, LOWEST, np.uint32)
    words = np.empty(symbols.size + 1, np.uint16)
    known = frequencies.astype(np.uint32), cumulative(frequencies).astype(np.uint32)
    at = _encoded(symbols, starts, lengths, tables, *known, states, words)
    return np.concatenate([states.astype("<u4").view("<u2"), words[at:]])
