"""Static rANS (Duda, arXiv 1311.2540) over rows of symbols: tables of frequencies, and their bytes.

A table gives each of 256 symbols a frequency; those of a table add up to 2^12. The loops are in `kernels`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wire.codecs import kernels
from wire.codecs.kernels import ESCAPE, LARGEST, LOWEST, SYMBOLS, TOTAL, Ints, States, Words
from wire.codecs.rank_rows import RankRows
from wire.errors import PayloadError, Reason

MANY = 1 << 16
"""Entries from which on 32 lanes are worth their 128 bytes."""


def lanes(size: int) -> int:
    """How many states take turns, for `size` entries."""
    return 32 if size >= MANY else 4


def normalized(counts: Ints) -> Ints:
    """Frequencies for `counts` [SYMBOLS] that add up to 2^12, at least 1 for what occurs; ±k have the same one."""
    levels = np.concatenate([[counts[0]], counts[1:ESCAPE:2] + counts[2:ESCAPE:2], [counts[ESCAPE]]])
    share = spread(levels, np.concatenate([[1], np.full(LARGEST, 2), [1]]))
    return by_symbol(share[:-1], int(share[-1]))


def spread(counts: Ints, weights: Ints | None = None) -> Ints:
    """Frequencies for any `counts`, so that Σ weight · frequency is 2^12; the first weight is 1. At least 1 for what occurs."""
    weights = np.ones_like(counts) if weights is None else weights
    share = np.where(counts > 0, np.maximum(1, counts * TOTAL // (weights * max(1, int(counts.sum())))), 0)
    while missing := TOTAL - int((share * weights).sum()):
        share[_best(share, counts, missing)] += 1 if missing > 0 else -1
    return share


def _best(share: Ints, counts: Ints, missing: int) -> int:
    """Where one more brings most, or one less costs least; the first takes what is left of an odd sum."""
    if missing == 1 or (missing == -1 and share[0] > 1):
        return 0
    if missing > 0:
        return int(np.argmax(counts / (share + 1.0)))
    return int(np.argmin(np.where(share > 1, counts / np.maximum(share, 1), np.inf)))


def by_symbol(levels: Ints, escape: int) -> Ints:
    """Frequencies [SYMBOLS] from those of 0, 1, … LARGEST (of each sign) and of the escape."""
    return np.concatenate([levels[:1], np.repeat(levels[1:], 2), [escape]])


def cost(frequencies: Ints, counts: Ints) -> float:
    """Bits of `counts` symbols under `frequencies`, both [SYMBOLS]."""
    some = counts > 0
    return float((counts[some] * (kernels.PRECISION - np.log2(frequencies[some]))).sum())


def lookup(frequencies: Ints) -> npt.NDArray[np.uint32]:
    """What each of the 2^12 slots of a table means: symbol << 24 | (frequency - 1) << 12 | slot within the symbol."""
    tables = np.zeros((len(frequencies), TOTAL), np.uint32)
    for table, row in zip(tables, frequencies, strict=True):
        first = np.repeat(np.cumsum(row) - row, row)
        symbols, widths = np.repeat(np.arange(SYMBOLS), row), np.repeat(row, row)
        table[:] = symbols << 24 | (widths - 1) << 12 | (np.arange(TOTAL) - first)
    return tables


class Reader:
    """Rows of symbols, one after the other, from the words of `encode`. Raises PayloadError."""

    def __init__(self, words: Words, lanes: int, longest: int, size: int = 0, quantizers: int = 1) -> None:
        self._kernel = kernels.fastest(size, "kernels" if quantizers == 1 else "viterbi")
        self._paths = [np.zeros(lanes, np.uint8)] if quantizers == 2 else []
        whole = len(words) >= 2 * lanes
        self._states: States = words[: 2 * lanes].astype("<u2").view("<u4").copy() if whole else np.zeros(1, np.uint32)
        if (self._states < LOWEST).any():
            raise PayloadError(Reason.BAD_PAYLOAD, "the coded symbols do not begin with their states")
        self._words = np.concatenate([words[2 * lanes :], np.zeros(longest + 1, np.uint16)])
        self._at, self._end = 0, len(words) - 2 * lanes

    def read(
        self, rows: RankRows, tables: Ints, lookup: npt.NDArray[np.uint32], values: npt.NDArray[np.generic]
    ) -> npt.NDArray[np.generic]:
        """What `values` [tables, SYMBOLS] says of the next rows' symbols, one after the other; 0 where a row is left out.

        With two quantizers, `lookup` and `values` have for each of `tables` those of both, one after the other."""
        out = np.zeros(int(rows.lengths.sum()), values.dtype)
        self._at = self._kernel.decode(
            self._words, self._at, self._states, *self._paths, lookup, values, rows.starts, rows.lengths, tables, out
        )
        if self._at < 0 or self._at > self._end:
            raise PayloadError(Reason.BAD_PAYLOAD, "the coded symbols end too early")
        return out

    def close(self) -> None:
        """All words have been read and the states are what they were before the first symbol. Raises PayloadError."""
        if self._at != self._end or (self._states != LOWEST).any():
            raise PayloadError(Reason.BAD_PAYLOAD, "the coded symbols are not those of an encoder")
