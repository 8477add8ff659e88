"""Rank rotation stage: the energy of LoRA deltas lies along few directions across the rank axis; turn them onto the first rows.

A reflector (Householder 1958) I - 2 v vᵀ / vᵀv is orthogonal for every v, so that coarse entries cost no accuracy, only some
of the concentration; it is its own inverse. Flat random rotations (DRIVE, EDEN) would destroy what this uses.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import ClassVar, Literal

import numpy as np
import numpy.typing as npt

from wire.codecs import Fields, FieldShape, Shape, State, expect, kernels, rank_rows
from wire.delta import Tensor, Vector
from wire.errors import PayloadError, Reason

Floats = npt.NDArray[np.float64]
Normal = npt.NDArray[np.int8]
ITERATIONS = 24
"""Steps of the power method: enough for a direction with a third of the energy, and nothing depends on more."""
GRAM_BITS = 11
COLUMNS = 256
"""Directions are found from so many entries of each row, at least."""


@dataclasses.dataclass(frozen=True)
class RankRotate:
    """`values` float32 [n] -> `values` in row order, turned, and `normals` uint8: integers of `bits` bits.

    Of every factor of rank r above `reflectors`, the first reflector turns the direction of most energy onto the first rank row;
    each following one works on the rows after. A normal begins with 2^(bits - 1) - 1, which is not sent.
    """

    reflectors: int = 2
    bits: int = 6
    id: ClassVar[str] = "rank_rotate"
    kind: ClassVar[Literal["fields"]] = "fields"

    def __post_init__(self) -> None:
        if not 1 <= self.reflectors <= 8 or not 2 <= self.bits <= 8:
            raise ValueError("reflectors must lie between 1 and 8, bits between 2 and 8")

    @property
    def top(self) -> int:
        """The first entry of a normal, and the largest."""
        return (1 << (self.bits - 1)) - 1

    def emits(self, like: Shape) -> Shape:
        values = expect(like, "values", "float32")
        rest = {name: shape for name, shape in like.items() if name != "values"}
        turned = dataclasses.replace(values, tensors=rank_rows.ordered(values.tensors))
        return {"normals": FieldShape("uint8", -(-self._entries(values) * self.bits // 8)), "values": turned, **rest}

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        tensors, kernel = like["values"].tensors, kernels.fastest(like["values"].length)
        values = rank_rows.gathered(x["values"], tensors)
        values = values.copy() if values is x["values"] else values
        normals = self._found(values, tensors)
        for part, mine in zip(_parts(values, tensors), normals, strict=True):
            for number, normal in enumerate(mine):
                kernel.reflect(part[number:], normal)
        entries = [normal[1:] for mine in normals for normal in mine]
        rest = {name: field for name, field in x.items() if name != "values"}
        return {
            "normals": _packed(np.concatenate([np.zeros(0, np.int8), *entries]), self.bits),
            "values": values,
            **rest,
        }, {}

    def decode(self, y: Fields, like: Shape) -> Fields:
        tensors, values = like["values"].tensors, np.array(y["values"], np.float32)
        for _ in self.turned(y, like, _parts(values, tensors)):
            pass  # turned in place
        rest = {name: field for name, field in y.items() if name not in ("normals", "values")}
        return {"values": rank_rows.scattered(values, tensors), **rest}

    def turned(self, y: Fields, like: Shape, parts: Iterable[Vector]) -> Iterator[Vector]:
        """Tensor after tensor, turned back in place. Raises PayloadError."""
        kernel = kernels.fastest(like["values"].length)
        entries, at = _unpacked(y["normals"], self.bits, self._entries(like["values"])), 0
        for part, (rank, columns) in zip(parts, rank_rows.grids(like["values"].tensors), strict=True):
            end = at + self._sent(rank)
            kernel.turn_back(part.reshape(rank, columns), entries[at:end], self.top, self._many(rank))
            at = end
            yield part

    def _many(self, rank: int) -> int:
        """Reflectors of a tensor; none where there is no rank axis to turn."""
        return self.reflectors if rank > self.reflectors else 0

    def _entries(self, values: FieldShape) -> int:
        """How many entries of normals are sent."""
        return sum(self._sent(rank) for rank, _ in rank_rows.grids(values.tensors))

    def _sent(self, rank: int) -> int:
        """Of a tensor's normals all but the first entry of each."""
        many = self._many(rank)
        return many * rank - many * (many + 1) // 2

    def _found(self, values: Vector, tensors: tuple[Tensor, ...]) -> list[list[Normal]]:
        """The normals of each tensor, first to last."""
        found: list[list[Normal]] = [[] for _ in tensors]
        grams = {number: gram(part) for number, part in enumerate(_parts(values, tensors)) if self._many(len(part))}
        for rank in {len(g) for g in grams.values()}:
            mine = [number for number, g in grams.items() if len(g) == rank]
            some = np.stack([grams[number] for number in mine], axis=-1)
            for first in range(self.reflectors):
                normals = np.rint(_directions(some[first:, first:]) * self.top).astype(np.int8)
                some[first:, first:] = _turned(some[first:, first:], normals.astype(np.float64))
                for number, normal in zip(mine, np.ascontiguousarray(normals.T), strict=True):
                    found[number].append(normal)
        return found


def gram(rows: Vector) -> Floats:
    """The products of rank rows with one another, float64 [r, r]: of some entries of each, rounded to GRAM_BITS bits of a
    power of two above the largest. Such sums are exact in float64, in any order."""
    some = np.ascontiguousarray(rows[:, :: max(1, rows.shape[1] // COLUMNS)])
    largest = float(max(some.max(), -some.min()))
    if largest < 2.0**-100:
        return np.eye(len(rows))
    whole = np.rint(some * np.float32(2.0 ** (GRAM_BITS - math.frexp(largest)[1]))).astype(np.float64)
    products: Floats = whole @ whole.T
    return products


def _directions(grams: Floats) -> Floats:
    """Normals [r, tensors], the first entry 1, of the reflectors that turn the direction of most energy onto the first row.

    `grams` [r, r, tensors]: tensors last, so that sums add long rows to one another."""
    found = 1 + grams.diagonal().T / np.maximum(1e-300, grams.max(axis=(0, 1)))
    for _ in range(ITERATIONS):
        found = (grams * found[:, None]).sum(axis=0)
        found /= np.maximum(1e-300, np.sqrt((found * found).sum(axis=0)))
    found = np.where(found[:1] < 0, -found, found)
    found[0] += 1
    normals: Floats = found / found[:1]
    return normals


def _turned(grams: Floats, normals: Floats) -> Floats:
    """H G H for reflectors H = I - 2 v vᵀ / vᵀv."""
    scale = 2 / (normals * normals).sum(axis=0)
    along = (grams * normals[:, None]).sum(axis=0)[:, None] * scale * normals[None]
    half = grams - along
    turned: Floats = half - scale * normals[:, None] * (half * normals[:, None]).sum(axis=0)[None]
    return turned


def _parts(values: Vector, tensors: tuple[Tensor, ...]) -> Iterator[Vector]:
    start = 0
    for rows, columns in rank_rows.grids(tensors):
        yield values[start : start + rows * columns].reshape(rows, columns)
        start += rows * columns


def _packed(entries: Normal, bits: int) -> npt.NDArray[np.uint8]:
    """Two's complement of `bits` bits each, the most significant first."""
    all_bits = np.unpackbits(entries.view(np.uint8)[:, None], axis=1)
    return np.packbits(all_bits[:, 8 - bits :].reshape(-1))


def _unpacked(packed: npt.NDArray[np.uint8], bits: int, count: int) -> Normal:
    found = np.unpackbits(packed)
    if found[count * bits :].any():
        raise PayloadError(Reason.BAD_PAYLOAD, "the padding after the normals is not zero")
    table = found[: count * bits].reshape(count, bits)
    entries = np.packbits(np.concatenate([np.repeat(table[:, :1], 8 - bits, axis=1), table], axis=1), axis=1)
    return entries.reshape(-1).view(np.int8)
