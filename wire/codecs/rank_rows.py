"""Rank rows: a layout's entries in the order in which their scale changes least, one direction of the rank after the other.

Of `lora_A` [r, in] a rank row is a row, of `lora_B` [out, r] a column; a tensor of any other role is one row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from wire.codecs import FieldShape
from wire.delta import Tensor, Vector


@dataclasses.dataclass(frozen=True, eq=False)
class RankRows:
    """Where rows begin in row order, and their lengths: int64 [rows]."""

    starts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.lengths)


def grid(tensor: Tensor) -> tuple[int, int]:
    """How many rank rows a tensor has, and how many entries each.

    >>> grid(Tensor("b", (64, 4), "lora_B"))
    (4, 64)
    """
    match tensor:
        case Tensor(shape=(rank, columns), role="lora_A") | Tensor(shape=(columns, rank), role="lora_B"):
            return rank, columns
    return 1, tensor.size


@functools.lru_cache(maxsize=8)
def grids(tensors: tuple[Tensor, ...]) -> tuple[tuple[int, int], ...]:
    """`grid` of every tensor."""
    return tuple(grid(tensor) for tensor in tensors)


def of(like: FieldShape) -> RankRows:
    """The rank rows of a field; one row if nobody says whose entries they are."""
    return _of(like.tensors, like.length)


@functools.lru_cache(maxsize=8)
def _of(tensors: tuple[Tensor, ...], size: int) -> RankRows:
    grids = [grid(tensor) for tensor in tensors] or [(1, size)]
    lengths = np.concatenate([np.full(rows, columns, np.int64) for rows, columns in grids])
    return RankRows(np.cumsum(lengths) - lengths, lengths)


def by_tensor(like: FieldShape) -> tuple[tuple[slice, RankRows], ...]:
    """Which rows are each tensor's, and where they lie in it."""
    return _by_tensor(like.tensors, like.length)


@functools.lru_cache(maxsize=8)
def _by_tensor(tensors: tuple[Tensor, ...], size: int) -> tuple[tuple[slice, RankRows], ...]:
    found, first = [], 0
    for rows, columns in grids(tensors) or ((1, size),):
        starts, lengths = np.arange(rows) * columns, np.full(rows, columns)
        found.append((slice(first, first + rows), RankRows(starts, lengths)))
        first += rows
    return tuple(found)


@functools.lru_cache(maxsize=8)
def ordered(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors as they lie in row order: [rows, columns] each."""
    return tuple(dataclasses.replace(t, shape=grid(t), role="lora_A") if t.role == "lora_B" else t for t in tensors)


def gathered(vector: Vector, tensors: tuple[Tensor, ...]) -> Vector:
    """`vector` in row order, float32 [size]."""
    if not any(map(_turned, tensors)):
        return vector
    out = np.empty_like(vector)
    for tensor, place in places(tensors):
        if _turned(tensor):
            out[place].reshape(grid(tensor))[...] = vector[place].reshape(tensor.shape).T
        else:
            out[place] = vector[place]
    return out


def scattered(rows: Vector, tensors: tuple[Tensor, ...]) -> Vector:
    """The inverse of `gathered`."""
    if not any(map(_turned, tensors)):
        return rows
    out = np.empty_like(rows)
    for tensor, place in places(tensors):
        out[place] = rows[place].reshape(grid(tensor)).T.reshape(-1) if _turned(tensor) else rows[place]
    return out


def shaped(rows: Vector, tensor: Tensor) -> Vector:
    """A view of one tensor's entries in row order, in its own shape."""
    return rows.reshape(grid(tensor)).T if _turned(tensor) else rows.reshape(tensor.shape)


def _turned(tensor: Tensor) -> bool:
    return tensor.role == "lora_B" and len(tensor.shape) == 2


def places(tensors: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, slice]]:
    """Where each tensor's entries lie."""
    start = 0
    for tensor in tensors:
        yield tensor, slice(start, start + tensor.size)
        start += tensor.size
