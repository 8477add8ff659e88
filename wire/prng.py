"""Directions from seeds: keyed Philox4x32-10 (Salmon et al., SC 2011) to ±1, in integers only. The same bits everywhere.

Direction `n` under a 64-bit `key` is a vector of signs. Entry i is bit i mod 32 of word (i div 32) mod 4 of
Philox(counter = (i div 128, 0, n mod 2^32, n div 2^32), key): 0 is +1, 1 is -1. docs/wire-format.md says it to the bit.

±1 times a number rounds nothing, and sums are int64: any order, any processor and any library gives the same vector.
Directions differ by counter under one key, never by a hash of counter and seed: those are correlated.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Signs = npt.NDArray[np.int8]
Units = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Strand = tuple[int, Units]
"""A key, and the multiple (int64) of each of its directions, counted from 0."""
Combine = Callable[[Sequence[Strand], int], Units]
"""Σ multiple · direction over strands, int64 [size]; exact while the sum of |multiples| is below 2^63."""

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
BLOCK = 128
"""Signs of one Philox block."""
LARGE = 1 << 28
"""Signs that numpy adds in about two seconds."""
SLAB = 1 << 17
"""Entries summed at a time by numpy: the accumulator of a slab stays in cache."""
_LOW = np.uint64(0xFFFFFFFF)
_HALF = np.uint64(32)


def philox(counter: tuple[Words, Words, Words, Words], key: int) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 of 32-bit words held in uint64 arrays of one shape; `key` has 64 bits, its low word first."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(ROUNDS):
        p0, p1 = np.uint64(MULTIPLIERS[0]) * c0, np.uint64(MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (
            (p1 >> _HALF) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _HALF) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def words(key: int, direction: int, count: int) -> npt.NDArray[np.uint32]:
    """The first `count` words of a direction's stream, uint32 [count]."""
    return _stream(key, direction, 0, -(-count // 4)).reshape(-1)[:count].astype(np.uint32)


def bits(key: int, direction: int, first: int, blocks: int) -> npt.NDArray[np.uint8]:
    """The bits of `blocks` Philox blocks from block `first` on, one a byte: uint8 [blocks · 128] of 0 and 1."""
    stream = _stream(key, direction, first, blocks)
    return np.unpackbits(stream.view(np.uint8).reshape(-1), bitorder="little")


def _stream(key: int, direction: int, first: int, blocks: int) -> npt.NDArray[np.uint32]:
    """Philox words of `blocks` blocks from block `first` on, little-endian [blocks, 4]."""
    at = np.arange(first, first + blocks, dtype=np.uint64)
    low, high = np.uint64(direction & 0xFFFFFFFF), np.uint64(direction >> 32)
    found = philox((at, np.zeros_like(at), np.full_like(at, low), np.full_like(at, high)), key)
    stream: npt.NDArray[np.uint32] = np.stack(found, axis=1).astype("<u4")
    return stream


def signs(key: int, direction: int, size: int) -> Signs:
    """Direction `direction` under `key`: int8 [size] of +1 and -1."""
    drawn = bits(key, direction, 0, -(-size // BLOCK))[:size].view(np.int8)
    return np.int8(1) - np.int8(2) * drawn


def combine(strands: Sequence[Strand], size: int) -> Units:
    """A Combine: by numba where it is installed and the work is worth its 100 MB and its seconds of loading."""
    work = size * sum(int(np.count_nonzero(multiples)) for _, multiples in strands)
    fast = work > LARGE and importlib.util.find_spec("numba") is not None
    return combine_numba(strands, size) if fast else combine_numpy(strands, size)


def combine_numpy(strands: Sequence[Strand], size: int) -> Units:
    """A Combine in numpy alone."""
    total = np.zeros(size, np.int64)
    for key, multiples in strands:
        _add(total, key, multiples)
    return total


def combine_numba(strands: Sequence[Strand], size: int) -> Units:
    """A Combine in a compiled kernel, some thirty times as fast. Needs numba."""
    from wire import prng_numba

    return prng_numba.combine(strands, size)


def _add(total: Units, key: int, multiples: Units) -> None:
    """total += Σ multiple · (1 - 2 · bit): the sum of multiples once, and twice the multiple where a bit is set."""
    used: Any = np.flatnonzero(multiples)
    total += int(multiples.sum())
    for start in range(0, len(total), SLAB):
        part = total[start : start + SLAB]
        blocks = -(-len(part) // BLOCK)
        for direction in used:
            drawn = bits(key, int(direction), start // BLOCK, blocks)[: len(part)]
            part -= drawn * (2 * multiples[direction])
