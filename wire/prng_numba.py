"""The fused kernel of `wire.prng.combine`: many directions into one accumulator, a block of 128 entries at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np

from wire.prng import BLOCK, MULTIPLIERS, ROUNDS, WEYL, Strand, Units

M0, M1 = np.uint64(MULTIPLIERS[0]), np.uint64(MULTIPLIERS[1])
W0, W1 = np.uint64(WEYL[0]), np.uint64(WEYL[1])
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


def combine(strands: Sequence[Strand], size: int) -> Units:
    """As `wire.prng.combine`."""
    total = np.zeros(-(-size // BLOCK) * BLOCK, np.int64)
    for key, multiples in strands:
        used = np.flatnonzero(multiples)
        _add(total, np.uint64(key), used.astype(np.uint64), multiples[used])
    return total[:size]


def _kernel(total: Any, key: Any, directions: Any, multiples: Any) -> None:
    """Words are kept in uint64 and cut to 32 bits after every step: numba widens 32-bit products by itself otherwise."""
    words = np.empty(4, np.uint64)
    for block in range(total.size // BLOCK):
        for n in range(directions.size):
            c0, c1 = np.uint64(block), np.uint64(0)
            c2, c3 = directions[n] & LOW, directions[n] >> HALF
            k0, k1 = key & LOW, key >> HALF
            for _ in range(ROUNDS):
                p0, p1 = M0 * c0, M1 * c2
                c0, c1, c2, c3 = (p1 >> HALF) ^ c1 ^ k0, p1 & LOW, (p0 >> HALF) ^ c3 ^ k1, p0 & LOW
                k0, k1 = (k0 + W0) & LOW, (k1 + W1) & LOW
            words[0], words[1], words[2], words[3] = c0, c1, c2, c3
            multiple = multiples[n]
            for w in range(4):
                word = words[w]
                start = block * BLOCK + w * 32
                for i in range(32):
                    bit = np.int64((word >> np.uint64(i)) & np.uint64(1))
                    total[start + i] += multiple - 2 * multiple * bit


_add = numba.njit(cache=True, nogil=True)(_kernel)
