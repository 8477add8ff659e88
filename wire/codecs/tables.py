"""The tables of an `ecsq` update: frequencies and centroids of each class of rows, which row is of which class, as bytes."""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from wire.codecs import kernels, rans
from wire.codecs.kernels import ESCAPE, LARGEST, SYMBOLS, TOTAL, Ints, Words
from wire.codecs.rank_rows import RankRows
from wire.delta import Vector
from wire.errors import PayloadError, Reason

MOST = 48
"""Classes of one update."""
CENTROID_UNITS = 128
"""A centroid is told in units of 1/128 of a step from its level."""
CENTROIDS = 3
Number = TypeVar("Number", bound=np.generic)
ONE = np.zeros(1, np.int64)
ONE_ZERO = (np.arange(SYMBOLS) == 0).astype(np.int64)
"""What is counted where nothing came."""


def longest(quantizers: int) -> int:
    """Bytes of the most and largest tables."""
    return 1 + MOST * quantizers * (1 + CENTROIDS + 2 * (1 + LARGEST)) + 2 * (1 + MOST)


@dataclasses.dataclass(frozen=True, eq=False)
class Tables:
    """`frequencies` int64 [tables, SYMBOLS]; `centroids` int64 [tables, 3] of levels of 1, of 2 and above, in CENTROID_UNITS from
    where the level lies; `classes` int64 [SYMBOLS]: frequencies of the rows' classes from 1 on, 0 for a row that is left out.

    A class has a table for each quantizer, one after the other: with one a level k lies at k steps, with two, which take turns
    (`viterbi`), at 2 k or, for the second, 2 k - 1."""

    frequencies: Ints
    centroids: Ints
    classes: Ints
    quantizers: int = 1

    def to_bytes(self) -> npt.NDArray[np.uint8]:
        """How many there are; of each its largest level, centroids and frequencies; then those of the classes."""
        made = bytearray([self.count])
        for frequencies, centroids in zip(self.frequencies, self.centroids, strict=True):
            levels = np.concatenate([frequencies[:1], frequencies[1:ESCAPE:2]])
            largest = int(np.flatnonzero(levels).max(initial=0))
            made += bytes([largest]) + centroids.astype(np.int8).tobytes() + _written(levels[: largest + 1])
        made += _written(self.classes[: self.count + 1])
        return np.frombuffer(bytes(made), np.uint8)

    def by_class(self, of_tables: npt.NDArray[Number]) -> npt.NDArray[Number]:
        """What is known of tables [tables, n], class after class [classes, quantizers · n]."""
        return of_tables.reshape(self.count, self.quantizers * of_tables.shape[1])

    @property
    def count(self) -> int:
        """How many classes there are."""
        return len(self.frequencies) // self.quantizers

    def values(self, step: np.float32) -> Vector:
        """What a symbol of a table means, float32 [tables, SYMBOLS]: sign · step · (place + centroid); nan for the escape."""
        levels, second = np.arange(1, LARGEST + 1), np.arange(len(self.frequencies))[:, None] % self.quantizers
        shift = self.centroids[:, np.minimum(levels, CENTROIDS) - 1] / CENTROID_UNITS
        magnitudes = step * (self.quantizers * levels - second + shift).astype(np.float32)
        found = np.full((len(self.frequencies), SYMBOLS), np.nan, np.float32)
        found[:, 0], found[:, 1:ESCAPE:2], found[:, 2:ESCAPE:2] = 0.0, magnitudes, -magnitudes
        return found

    @functools.cached_property
    def escaping(self) -> bool:
        """Whether some level may have no symbol."""
        return bool(self.frequencies[:, ESCAPE].any())

    def rows(self, words: Words, count: int, size: int) -> Ints:
        """The class of each of `count` rows of `size` entries, -1 for one that is left out. Raises PayloadError."""
        reader = rans.Reader(words, 1, count, size)
        every = RankRows(ONE, np.array([count]))
        identity = np.arange(SYMBOLS, dtype=np.uint8)[None]
        found = reader.read(every, ONE, rans.lookup(self.classes[None]), identity)
        reader.close()
        return found.astype(np.int64) - 1


def of(counts: Ints, residuals: Ints, used: Ints, quantizers: int = 1) -> Tables:
    """The tables for what `quantize` or `search` counted, [tables, …], and for the rows' classes `used`."""
    counts = np.where(counts.any(axis=1, keepdims=True), counts, ONE_ZERO)
    frequencies = np.array([rans.normalized(count) for count in counts], np.int64).reshape(-1, SYMBOLS)
    of_one, of_two = counts[:, 1:3].sum(axis=1), counts[:, 3:5].sum(axis=1)
    many = np.stack([of_one, of_two, counts[:, 5:].sum(axis=1)], axis=1)
    mean = (2 * residuals + many) * CENTROID_UNITS // np.maximum(1, 2 * many * kernels.UNITS)
    centroids = np.clip(mean, -CENTROID_UNITS, CENTROID_UNITS - 1)
    return Tables(frequencies, centroids, rans.spread(np.bincount(used + 1, minlength=SYMBOLS)), quantizers)


def coded_rows(tables: Tables, used: Ints, size: int) -> Words:
    """The inverse of `Tables.rows`."""
    length = np.array([len(used)])
    words: Words = kernels.fastest(size).encode((used + 1).astype(np.uint8), ONE, length, ONE, tables.classes[None], 1)
    return words


def parse(data: npt.NDArray[np.uint8], quantizers: int = 1) -> Tables:
    """The inverse of `to_bytes`. Raises PayloadError."""
    numbers, count = _Numbers(data.tobytes()), int(data[0]) if len(data) else MOST + 1
    if count > MOST:
        raise PayloadError(Reason.BAD_PAYLOAD, f"at most {MOST} classes can be")
    numbers.byte()
    many = count * quantizers
    frequencies, centroids = np.zeros((many, SYMBOLS), np.int64), np.zeros((many, CENTROIDS), np.int64)
    for table in range(many):
        largest = numbers.byte()
        centroids[table] = [(numbers.byte() ^ 128) - 128 for _ in range(CENTROIDS)]
        levels = np.zeros(LARGEST + 1, np.int64)
        for level in range(min(largest, LARGEST) + 1):
            levels[level] = numbers.number()
        frequencies[table] = rans.by_symbol(levels, TOTAL - int(levels[0] + 2 * levels[1:].sum()))
    classes = np.zeros(SYMBOLS, np.int64)
    classes[: count + 1] = [numbers.number() for _ in range(count + 1)]
    if numbers.left or (frequencies < 0).any() or classes.sum() != TOTAL:
        raise PayloadError(Reason.BAD_PAYLOAD, "the tables are not those of an encoder")
    return Tables(frequencies, centroids, classes, quantizers)


class _Numbers:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def byte(self) -> int:
        if not self.left:
            raise PayloadError(Reason.BAD_PAYLOAD, "the tables end too early")
        self._at += 1
        return self._data[self._at - 1]

    def number(self) -> int:
        """Seven bits a byte, the low ones first; the highest bit of the first byte says that another follows."""
        low = self.byte()
        found = low if low < 128 else (low & 127) | (self.byte() << 7)
        if found > TOTAL:
            raise PayloadError(Reason.BAD_PAYLOAD, "a frequency is larger than all together")
        return found


def _written(numbers: Ints) -> bytes:
    return b"".join(bytes([v]) if v < 128 else bytes([v & 127 | 128, v >> 7]) for v in numbers.tolist())
