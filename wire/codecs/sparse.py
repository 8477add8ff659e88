"""Few entries, otherwise chosen than by `top_k`: by a shared seed, in chunks, or as sums in a sketch."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from wire.codecs import Array, Fields, FieldShape, Shape, State, bits, expect
from wire.codecs.blockwise import blocks
from wire.codecs.floats import half
from wire.codecs.top_k import kept


@dataclasses.dataclass(frozen=True)
class RandomK:
    """`values` [n] -> `values` [k]: the entries that `seed` chooses, the same for all devices and so without positions
    (arXiv 1610.05492). Linear: sums of coded updates decode to sums."""

    fraction: float
    seed: int = 0
    id: ClassVar[str] = "random_k"
    kind: ClassVar[Literal["fields"]] = "fields"

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0 or not 0 <= self.seed < 1 << 64:
            raise ValueError("fraction must be above 0 and at most 1, seed below 2^64")

    def emits(self, like: Shape) -> Shape:
        return {"values": FieldShape("float32", kept(self.fraction, expect(like, "values", "float32").length))}

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        return {"values": x["values"][self._positions(len(x["values"]))]}, {}

    def decode(self, y: Fields, like: Shape) -> Fields:
        values = np.zeros(like["values"].length, np.float32)
        values[self._positions(len(values))] = y["values"]
        return {"values": values}

    def _positions(self, size: int) -> Array:
        order = np.argsort(np.random.Philox(key=self.seed).random_raw(size), kind="stable")
        return np.sort(order[: kept(self.fraction, size)])


@dataclasses.dataclass(frozen=True)
class ChunkTopK:
    """`values` -> of each chunk its largest entries: `levels` float16 [chunks · 2], `positions` and `codes`, bits each.

    SparseLoCo's packing (arXiv 2508.15706): 64 of 4096, 12 bits a position, 2 bits a value. Which four values the two bits mean
    is not said there; here they are ± the means of the entries below and above the mean magnitude.
    """

    chunk: int = 4096
    kept: int = 64
    id: ClassVar[str] = "chunk_top_k"
    kind: ClassVar[Literal["fields"]] = "fields"

    def __post_init__(self) -> None:
        if not 1 <= self.kept <= self.chunk <= 1 << 16:
            raise ValueError("expected 1 <= kept <= chunk <= 65536")

    @property
    def width(self) -> int:
        """Bits of a position."""
        return max(1, (self.chunk - 1).bit_length())

    def emits(self, like: Shape) -> Shape:
        many = -(-expect(like, "values", "float32").length // self.chunk)
        return {
            "levels": FieldShape("float16", 2 * many),
            "positions": FieldShape("uint8", bits.size(many * self.kept, self.width)),
            "codes": FieldShape("uint8", bits.size(many * self.kept, 2)),
        }

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        chunks = blocks(x["values"], self.chunk)
        positions = np.sort(np.argsort(-np.abs(chunks), axis=1, kind="stable")[:, : self.kept], axis=1)
        values = np.take_along_axis(chunks, positions, axis=1)
        magnitudes = np.abs(values)
        large = magnitudes > magnitudes.mean(axis=1, keepdims=True, dtype=np.float64)
        levels = np.stack([_mean(magnitudes, ~large), _mean(magnitudes, large)], axis=1)
        codes = 2 * (values < 0) + large
        return {
            "levels": half(levels.reshape(-1)),
            "positions": bits.packed(positions.reshape(-1).astype(np.uint16), self.width),
            "codes": bits.packed(codes.reshape(-1).astype(np.uint16), 2),
        }, {}

    def decode(self, y: Fields, like: Shape) -> Fields:
        size, many = like["values"].length, len(y["levels"]) // 2
        positions = bits.unpacked(y["positions"], self.width, many * self.kept).reshape(many, self.kept) % self.chunk
        codes = bits.unpacked(y["codes"], 2, many * self.kept).reshape(many, self.kept)
        magnitudes = np.take_along_axis(
            y["levels"].astype(np.float32).reshape(many, 2), (codes & 1).astype(np.int64), axis=1
        )
        chunks = np.zeros((many, self.chunk), np.float32)
        np.put_along_axis(chunks, positions.astype(np.int64), np.where(codes >> 1, -magnitudes, magnitudes), axis=1)
        return {"values": chunks.reshape(-1)[:size]}


@dataclasses.dataclass(frozen=True)
class CountSketch:
    """`values` [n] -> `values` [rows · columns]: every row adds each entry, with a sign, to the column that `seed` chooses; an
    entry is estimated by the median over rows (FetchSGD, arXiv 2007.07682). Linear. rows · columns is `fraction` · n."""

    fraction: float
    rows: int = 3
    seed: int = 0
    id: ClassVar[str] = "count_sketch"
    kind: ClassVar[Literal["fields"]] = "fields"

    def __post_init__(self) -> None:
        if not 0.0 < self.fraction <= 1.0 or not 1 <= self.rows <= 15 or not 0 <= self.seed < 1 << 60:
            raise ValueError("fraction must be above 0 and at most 1, rows between 1 and 15, seed below 2^60")

    def emits(self, like: Shape) -> Shape:
        size = expect(like, "values", "float32").length
        return {"values": FieldShape("float32", self.rows * self._columns(size))}

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        values, columns = x["values"], self._columns(len(x["values"]))
        sums = [np.bincount(at, sign * values, columns) for at, sign in self._hashes(len(values))]
        return {"values": np.concatenate(sums).astype(np.float32)}, {}

    def decode(self, y: Fields, like: Shape) -> Fields:
        size = like["values"].length
        table = y["values"].astype(np.float32).reshape(self.rows, -1)
        estimates = [row[at] * sign for row, (at, sign) in zip(table, self._hashes(size), strict=True)]
        return {"values": np.median(np.stack(estimates), axis=0).astype(np.float32)}

    def _columns(self, size: int) -> int:
        return max(1, kept(self.fraction, size) // self.rows)

    def _hashes(self, size: int) -> list[tuple[Array, Array]]:
        """For each row, the column and the sign of every entry."""
        raws = [np.random.Philox(key=16 * self.seed + row).random_raw(size) for row in range(self.rows)]
        columns = np.uint64(self._columns(size))
        return [
            (
                (raw % columns).astype(np.int64),
                np.float32(1) - np.float32(2) * (raw >> np.uint64(63)).astype(np.float32),
            )
            for raw in raws
        ]


def _mean(magnitudes: Array, some: Array) -> Array:
    mean: Array = (magnitudes * some).sum(axis=1, dtype=np.float64) / np.maximum(1, some.sum(axis=1))
    return mean
