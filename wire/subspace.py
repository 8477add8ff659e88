"""Directions of low rank: a few drawn signs become a direction of a whole layout. Integers only, the same bits everywhere.

A direction is still a vector of ±1, so nothing about step sizes changes; what changes is how many signs are drawn, hence what
replaying a step costs, and that each tensor's direction is a matrix of rank `rank`:

- "subzero" (arXiv 2410.08989): U Z V^T with U and V column-orthogonal and kept for `refresh` rounds; Z [rank, rank] is drawn.
- "lozo" (arXiv 2410.07698): U V^T with U [rows, rank] drawn and V kept for `refresh` rounds.

Column-orthogonal here means: every row of U has one entry that is not zero, a sign. Columns then have no row in common, so
they are orthogonal exactly, without a rounding that machines could do differently.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from typing import Literal

import numpy as np
import numpy.typing as npt

from wire import prng
from wire.delta import Layout


@dataclasses.dataclass(frozen=True)
class Subspace:
    """How directions are built. `rank` is cut to what a tensor has; `refresh` in rounds, 0 for never."""

    structure: Literal["subzero", "lozo"] = "subzero"
    rank: int = 4
    refresh: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 256:
            raise ValueError("rank must lie between 1 and 256")
        if not 0 <= self.refresh <= 1_000_000:
            raise ValueError("refresh must lie between 0 and 1,000,000")

    def basis(self, layout: Layout, version: int) -> Basis:
        """What turns drawn signs into directions from release `version`."""
        return _basis(self, layout, version // self.refresh if self.refresh else 0)


@dataclasses.dataclass(frozen=True, eq=False)
class Basis:
    """Entry i of a direction is `signs[i]` times drawn sign `index[i]`, of which there are `drawn`."""

    index: npt.NDArray[np.int32]
    signs: npt.NDArray[np.int8]
    drawn: int

    def widened(self, values: npt.NDArray[np.int64] | prng.Signs) -> npt.NDArray[np.int64]:
        """Values of the drawn signs [drawn] as values of entries, int64 [layout.size]."""
        wide: npt.NDArray[np.int64] = values.astype(np.int64)[self.index] * self.signs
        return wide


@functools.lru_cache(maxsize=2)
def _basis(subspace: Subspace, layout: Layout, period: int) -> Basis:
    key = int.from_bytes(hashlib.sha256(f"edgetune/subspace/{period}".encode()).digest()[:8], "little")
    place = {"subzero": _subzero, "lozo": _lozo}[subspace.structure]
    indices, signs, drawn = [], [], 0
    for number, tensor in enumerate(layout.tensors):
        index, sign, count = place(tensor.shape, subspace.rank, key, number)
        indices.append(index + drawn)
        signs.append(sign)
        drawn += count
    return Basis(np.concatenate(indices).astype(np.int32), np.concatenate(signs).astype(np.int8), drawn)


Placed = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], int]


def _subzero(shape: tuple[int, ...], rank: int, key: int, number: int) -> Placed:
    """z[i, j] = u_i v_j Z[h(i), g(j)], after the tensor was reshaped as near to a square as its size allows."""
    rows, columns = _square(math.prod(shape))
    words = prng.words(key, number, rows + columns)
    h, u = _buckets(words[:rows], min(rank, rows))
    g, v = _buckets(words[rows:], min(rank, columns))
    wide = min(rank, columns)
    index = h[:, None] * wide + g[None, :]
    return index.reshape(-1), (u[:, None] * v[None, :]).reshape(-1), min(rank, rows) * wide


def _lozo(shape: tuple[int, ...], rank: int, key: int, number: int) -> Placed:
    """z[i, j] = U[i, g(j)] v_j, of the tensor as a matrix."""
    columns = shape[-1]
    rows = math.prod(shape) // columns
    kept = min(rank, columns)
    g, v = _buckets(prng.words(key, number, columns), kept)
    index = np.arange(rows)[:, None] * kept + g[None, :]
    return index.reshape(-1), np.tile(v, rows), rows * kept


def _square(size: int) -> tuple[int, int]:
    """The two factors of `size` that are nearest to each other, the smaller one first.

    >>> _square(4608)
    (64, 72)
    """
    small = next(n for n in range(math.isqrt(size), 0, -1) if size % n == 0)
    return small, size // small


def _buckets(words: npt.NDArray[np.uint32], count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """A bucket of `count` for each word, all about equally full, by the words' order; and a sign, by the lowest bit."""
    order = np.argsort(words >> np.uint32(1), kind="stable")
    buckets = np.empty(len(words), np.int64)
    buckets[order] = np.arange(len(words)) % count
    return buckets, 1 - 2 * (words & np.uint32(1)).astype(np.int64)
