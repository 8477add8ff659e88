"""One bit an entry, or few: scaled signs (arXiv 1901.09847), and quantization after a random rotation (DRIVE, EDEN)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from wire.codecs import Array, Fields, FieldShape, Shape, State, bits, chance, expect
from wire.codecs.blockwise import blocks, check_block
from wire.codecs.floats import half

LLOYD_MAX = {
    1: (0.7979,),
    2: (0.4528, 1.5104),
    3: (0.2451, 0.7560, 1.3439, 2.1520),
    4: (0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6181, 2.0690, 2.7326),
}
"""The positive levels of the best quantizers of a standard normal entry, by bits (Max 1960)."""


@dataclasses.dataclass(frozen=True)
class Sign:
    """`values` -> `scales` float16 [blocks] and `signs`, a bit each: the mean magnitude of its block, with its sign."""

    block: int = 4096
    id: ClassVar[str] = "sign"
    kind: ClassVar[Literal["fields"]] = "fields"

    def __post_init__(self) -> None:
        check_block(self.block, 1 << 20)

    def emits(self, like: Shape) -> Shape:
        size = expect(like, "values", "float32").length
        return {
            "scales": FieldShape("float16", -(-size // self.block)),
            "signs": FieldShape("uint8", bits.size(size, 1)),
        }

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        values = x["values"]
        many = np.minimum(self.block, len(values) - self.block * np.arange(-(-len(values) // self.block)))
        scales = half(np.abs(blocks(values, self.block)).sum(axis=1, dtype=np.float64) / many)
        return {"scales": scales, "signs": bits.packed((values < 0).astype(np.uint16), 1)}, {}

    def decode(self, y: Fields, like: Shape) -> Fields:
        size = like["values"].length
        signs = np.float32(1) - np.float32(2) * bits.unpacked(y["signs"], 1, size).astype(np.float32)
        return {"values": signs * np.repeat(y["scales"].astype(np.float32), self.block)[:size]}


@dataclasses.dataclass(frozen=True)
class Eden:
    """`values` -> `seed`, `scales` float32 [blocks] and `codes`: each block turned by random signs and a Hadamard matrix, then
    quantized to `bits` by the levels for normal entries. With one bit it is DRIVE (arXiv 2105.08339), else EDEN (2108.08842).

    `unbiased`: scaled so that the expectation over seeds is the input; else so that the error is least.
    """

    bits: Literal[1, 2, 3, 4] = 1
    block: int = 65536
    unbiased: bool = False
    id: ClassVar[str] = "eden"
    kind: ClassVar[Literal["fields"]] = "fields"

    def __post_init__(self) -> None:
        if self.block.bit_count() != 1 or not 2 <= self.block <= 1 << 20:
            raise ValueError("block must be a power of two up to 2^20")

    def emits(self, like: Shape) -> Shape:
        many = -(-expect(like, "values", "float32").length // self.block)
        codes = FieldShape("uint8", bits.size(many * self.block, self.bits))
        return {"seed": FieldShape("uint64", 1), "scales": FieldShape("float32", many), "codes": codes}

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        seed = chance.seed_of(x["values"])
        flat = blocks(x["values"], self.block)
        turned = _hadamard(flat * chance.signs(int(seed), flat.size).reshape(flat.shape))
        norms = np.sqrt(np.square(turned, dtype=np.float64).sum(axis=1, keepdims=True))
        codes = np.searchsorted(self._edges(), turned * np.sqrt(self.block) / np.maximum(norms, 1e-30))
        levels = self._levels()[codes]
        along = (turned * levels).sum(axis=1, dtype=np.float64)
        whole = np.square(levels, dtype=np.float64).sum(axis=1)
        scales = norms[:, 0] ** 2 / np.maximum(along, 1e-30) if self.unbiased else along / whole
        packed = bits.packed(codes.reshape(-1).astype(np.uint16), self.bits)
        return {"seed": np.array([seed]), "scales": scales.astype(np.float32), "codes": packed}, {}

    def decode(self, y: Fields, like: Shape) -> Fields:
        size, many = like["values"].length, len(y["scales"])
        codes = bits.unpacked(y["codes"], self.bits, many * self.block).reshape(many, self.block)
        turned = _hadamard(self._levels()[codes] * y["scales"].astype(np.float32)[:, None])
        values = turned * chance.signs(int(y["seed"][0]), turned.size).reshape(turned.shape)
        return {"values": values.reshape(-1)[:size]}

    def _levels(self) -> Array:
        upper = np.array(LLOYD_MAX[self.bits], np.float32)
        return np.concatenate([-upper[::-1], upper])

    def _edges(self) -> Array:
        levels = self._levels()
        edges: Array = (levels[1:] + levels[:-1]) / 2
        return edges


def _hadamard(rows: Array) -> Array:
    """Each row [2^k] times the orthonormal Hadamard matrix, its own inverse."""
    flat, width = rows.astype(np.float32), 1
    while width < rows.shape[1]:
        pairs = flat.reshape(len(rows), -1, 2, width)
        flat = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2).reshape(rows.shape)
        width *= 2
    turned: Array = flat * np.float32(1 / np.sqrt(rows.shape[1]))
    return turned
