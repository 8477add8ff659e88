"""The loops of the codecs in numpy. `kernels_numba` has the same ones compiled; both give the same bits.

That holds because every operation is on integers, or is one IEEE rounding of one float32 operation, in a stated order. Rows are
given by `starts` and `lengths`, int64; `tables` says which table each row uses, from 0, or -1 for a row that is left out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from wire.delta import Vector

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint16]
States = npt.NDArray[np.uint32]

PRECISION = 12
"""A table's frequencies add up to 2^12."""
TOTAL = 1 << PRECISION
LOWEST = 1 << 16
"""An rANS state lies in 2^16 ... 2^32 - 1 and gives or takes words of 16 bits."""
SYMBOLS = 256
ESCAPE = SYMBOLS - 1
LARGEST = (SYMBOLS - 2) // 2
"""The largest level that has a symbol: 2 k - 1 is +k, 2 k is -k."""
UNITS = 256
"""Levels are found in units of 1/256 of a step."""
LARGEST_LEVEL = 32767
BINS = 256
"""Bins of a class's histogram, the last of all that is above."""
SLAB = 1 << 17
LARGE = 1 << 18
"""Entries from which on the compiled kernels are worth the second that it takes to load them."""


def fastest(size: int, name: str = "kernels") -> Any:
    """The module of kernels for `size` entries: this one, or `kernels_numba`. The same for `viterbi`."""
    compiled = size >= LARGE and importlib.util.find_spec("numba") is not None
    return importlib.import_module(f"wire.codecs.{name}{'_numba' if compiled else ''}")


def cumulative(frequencies: Ints) -> Ints:
    """Of every symbol the frequencies of those below it in its table; `frequencies` [classes, tables · SYMBOLS]."""
    each = frequencies.reshape(len(frequencies), frequencies.shape[1] // SYMBOLS, SYMBOLS)
    return (np.cumsum(each, axis=2) - each).reshape(frequencies.shape)


def sums(values: Vector, factor: np.float32, starts: Ints, lengths: Ints) -> Ints:
    """Σ ⌊|x| · factor⌋ of every row, int64 [rows]."""
    total = np.empty(len(starts), np.int64)
    for rows, entries in _slabs(starts, lengths):
        units = (np.abs(values[entries]) * factor).astype(np.int64)
        total[rows] = np.add.reduceat(units, starts[rows] - entries.start)
    return total


def histogram(values: Vector, starts: Ints, lengths: Ints, classes: Ints, factors: Vector, every: int) -> Ints:
    """How often ⌊|x| · factors[class]⌋ is each bin, int64 [classes, BINS]; of every row each `every`-th entry."""
    counts = np.zeros((len(factors), BINS), np.int64)
    for start, length, number in zip(starts, lengths, classes, strict=True):
        units = np.abs(values[start : start + length : every]) * factors[number]
        counts[number] += np.bincount(np.minimum(units, np.float32(BINS - 1)).astype(np.int64), minlength=BINS)
    return counts


def quantize(
    values: Vector, starts: Ints, lengths: Ints, tables: Ints, inverse: np.float32, offsets: Ints
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int16], Ints, Ints]:
    """The symbols of all rows, uint8 [size] (0 in rows that are left out), and the levels of those that have none.

    With u = ⌊|x| · inverse⌋ in units, the level is (u + offsets[table]) div UNITS, at least 0. Also counted, for each table: how
    often every symbol comes, int64 [tables, SYMBOLS], and the sum of
    u - UNITS · level over levels of 1, of 2 and above, int64 [tables, 3].
    """
    symbols = np.zeros(len(values), np.uint8)
    escapes, counts = [], np.zeros((len(offsets), SYMBOLS), np.int64)
    residuals = np.zeros((len(offsets), 3), np.int64)
    highest = np.float32(LARGEST_LEVEL * UNITS)
    for start, length, table in zip(starts, lengths, tables, strict=True):
        if table < 0:
            continue
        row = values[start : start + length]
        units = np.minimum(np.abs(row) * inverse, highest).astype(np.int64)
        levels = np.clip((units + offsets[table]) >> 8, 0, LARGEST_LEVEL)
        symbol = np.where(levels > LARGEST, ESCAPE, 2 * levels - ((row > 0) & (levels > 0)))
        symbols[start : start + length] = symbol
        escapes.append(np.where(row > 0, levels, -levels)[levels > LARGEST])
        counts[table] += np.bincount(symbol, minlength=SYMBOLS)
        some = levels > 0
        np.add.at(residuals[table], np.minimum(levels[some], 3) - 1, (units - UNITS * levels)[some])
    return symbols, np.concatenate([[], *escapes]).astype(np.int16), counts, residuals


def encode(
    symbols: npt.NDArray[Any], starts: Ints, lengths: Ints, tables: Ints, frequencies: Ints, lanes: int
) -> Words:
    """Interleaved rANS, uint16: the states of the lanes, low word first, then the words in the order of decoding.

    Symbol j of a row is in lane j mod `lanes`. Symbols are put in from the last to the first.
    """
    states = np.full(lanes, LOWEST, np.int64)
    below = cumulative(frequencies)
    words: list[Words] = []
    for row in np.flatnonzero(tables >= 0)[::-1]:
        frequency, before = frequencies[tables[row]], below[tables[row]]
        for j in range((lengths[row] - 1) // lanes * lanes, -1, -lanes):
            coded = symbols[starts[row] + j : starts[row] + min(j + lanes, lengths[row])]
            state, width = states[: len(coded)], frequency[coded]
            full = state >= width << (32 - PRECISION)
            words.append((state[full] & 0xFFFF).astype(np.uint16)[::-1])
            state = np.where(full, state >> 16, state)
            states[: len(coded)] = ((state // width) << PRECISION) + state % width + before[coded]
    body = np.concatenate([np.zeros(0, np.uint16), *words])[::-1]
    return np.concatenate([states.astype("<u4").view("<u2"), body])


def decode(
    words: Words,
    at: int,
    states: States,
    lookup: States,
    values: Any,
    starts: Ints,
    lengths: Ints,
    tables: Ints,
    out: Any,
) -> int:
    """Rows of `out` become what `values` [tables, SYMBOLS] says of their symbols; `states` are advanced. The next word's place,
    or -1 where `words` has too few: after its end stands one zero more than a row is long. `lookup`: see `wire.codecs.rans`."""
    lanes, state, padding = len(states), states.astype(np.int64), int(lengths.max(initial=0))
    for row in np.flatnonzero(tables >= 0):
        table, value = lookup[tables[row]].astype(np.int64), values[tables[row]]
        for j in range(0, int(lengths[row]), lanes):
            count = min(lanes, int(lengths[row]) - j)
            found = table[state[:count] & (TOTAL - 1)]
            moved = (((found >> 12) & 4095) + 1) * (state[:count] >> PRECISION) + (found & 4095)
            low = np.flatnonzero(moved < LOWEST)
            moved[low] = (moved[low] << 16) | words[at : at + len(low)]
            at += len(low)
            state[:count] = moved
            out[starts[row] + j : starts[row] + j + count] = value[found >> 24]
        if at >= len(words) - padding:
            return -1
    states[:] = state
    return at


def escaped(
    part: Vector, starts: Ints, lengths: Ints, tables: Ints, shifts: npt.NDArray[np.float64], step: np.float32,
    levels: npt.NDArray[np.int16], at: int,
) -> int:  # fmt: skip
    """Every nan of `part` becomes sign · step · (|level| + shifts[table of its row]) of the next of `levels` from `at` on. The
    next level's place, or -1 where one is 0 or missing."""
    places = np.flatnonzero(np.isnan(part))
    mine = levels[at : at + len(places)].astype(np.int64)
    if len(mine) < len(places) or not mine.all():
        return -1
    rows = np.searchsorted(starts + lengths, places, side="right")
    magnitudes = np.abs(mine) + shifts[tables[rows]]
    part[places] = step * np.copysign(magnitudes, mine).astype(np.float32)
    return at + len(places)


def reflect(rows: Vector, normal: npt.NDArray[np.int8]) -> None:
    """rows -= normal · (2 / normal² · (normal · rows)), in place; rows float32 [r, columns]. Sums run from the first row on."""
    factor = np.float32(2.0 / int((normal.astype(np.int64) ** 2).sum()))
    total = np.zeros(rows.shape[1], np.float32)
    for number, row in zip(normal, rows, strict=True):
        total += np.float32(number) * row
    total *= factor
    for number, row in zip(normal, rows, strict=True):
        row -= np.float32(number) * total


def turn_back(rows: Vector, entries: npt.NDArray[np.int8], top: int, many: int) -> None:
    """Undo `many` reflections, the last one first, in place; each has one row less than that before. `entries` has all normals'
    but the first of each, which is `top`."""
    end = len(entries)
    for number in range(many - 1, -1, -1):
        start = end - (len(rows) - number - 1)
        reflect(rows[number:], np.concatenate([np.array([top], np.int8), entries[start:end]]))
        end = start


def add(total: Ints, values: Vector, scale: np.float32, weight: int) -> None:
    """total += weight · round(values · scale), in place; `total` int64 and `values` float32 of one shape [rows, columns]."""
    total += np.rint(values * scale).astype(np.int32) * np.int64(weight)


def add_bytes(total: Ints, codes: npt.NDArray[np.int8], units: Ints, block: int) -> int:
    """total += code · units[block of it], in place, `total` int64 and `codes` of one length. The smallest code."""
    each = max(1, SLAB // block) * block
    for first in range(0, len(codes), each):
        some = codes[first : first + each]
        mine = units[first // block : -(-(first + len(some)) // block)]
        total[first : first + len(some)] += some * np.repeat(mine, block)[: len(some)]
    return int(codes.min(initial=0))


def add_nibbles(total: Ints, packed: npt.NDArray[np.uint8], units: Ints, block: int) -> int:
    """As `add_bytes` for codes that are stored as code + 8, two a byte, the earlier in the high half."""
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: len(total)].astype(np.int8) - np.int8(8)
    return add_bytes(total, codes, units, block)


def add_levels(
    total: Ints,
    packed: npt.NDArray[np.uint8],
    scales: Vector,
    block: int,
    levels: Vector,
    scale: np.float32,
    weight: int,
) -> None:
    """total += weight · round((levels[code] · scales[block]) · scale), in place, of codes of four bits, the earlier in the high
    half; `levels` float32 [16]."""
    each = max(2, SLAB // block) * block // 2 * 2
    for first in range(0, len(total), each):
        mine, some = total[first : first + each], packed[first // 2 : (first + each) // 2]
        codes = np.stack([some >> 4, some & 15], axis=1).reshape(-1)[: len(mine)]
        blocks = np.arange(first, first + len(mine)) // block
        mine += np.rint(levels[codes] * scales[blocks] * scale).astype(np.int32) * np.int64(weight)


def _slabs(starts: Ints, lengths: Ints) -> Iterator[tuple[slice, slice]]:
    """Rows, and their entries, some SLAB entries at a time."""
    first = 0
    while first < len(starts):
        end = max(first + 1, int(np.searchsorted(starts, starts[first] + SLAB, side="right")) - 1)
        end = len(starts) if starts[-1] + lengths[-1] - starts[first] <= SLAB else end
        yield slice(first, end), slice(int(starts[first]), int(starts[end - 1] + lengths[end - 1]))
        first = end
