"""Scalar quantizers with one scale for a bucket or for all: QSGD (arXiv 1610.02132), subtractive dither, ternary weights."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from wire.codecs import Array, Fields, FieldShape, Shape, State, chance, expect
from wire.codecs.blockwise import blocks, check_block
from wire.codecs.floats import half
from wire.errors import PayloadError, Reason

HIGHEST = 127


@dataclasses.dataclass(frozen=True)
class Qsgd:
    """`values` -> `norms` float32 [buckets] and `codes` uint8: sign and level of |v| · levels / norm, rounded up or down by
    chance so that the expectation is the input (arXiv 1610.02132). `entropy` codes what the paper codes by Elias."""

    levels: int = 4
    bucket: int = 512
    id: ClassVar[str] = "qsgd"
    kind: ClassVar[Literal["fields"]] = "fields"

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= HIGHEST or not 1 <= self.bucket <= 1 << 20:
            raise ValueError(f"levels must lie between 1 and {HIGHEST}, bucket between 1 and 2^20")

    def emits(self, like: Shape) -> Shape:
        size = expect(like, "values", "float32").length
        return {"norms": FieldShape("float32", -(-size // self.bucket)), "codes": FieldShape("uint8", size)}

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        values, size = x["values"], len(x["values"])
        norms = np.sqrt(np.square(blocks(values, self.bucket), dtype=np.float64).sum(axis=1)).astype(np.float32)
        ratio = np.abs(values) * np.float32(self.levels) / np.repeat(np.maximum(norms, 1e-30), self.bucket)[:size]
        levels = np.minimum(np.floor(ratio + chance.uniform(int(chance.seed_of(values)), size)), HIGHEST)
        return {"norms": norms, "codes": _folded(np.copysign(levels, values))}, {}

    def decode(self, y: Fields, like: Shape) -> Fields:
        scales = y["norms"].astype(np.float32) / np.float32(self.levels)
        return {"values": _unfolded(y["codes"]) * np.repeat(scales, self.bucket)[: like["values"].length]}


@dataclasses.dataclass(frozen=True)
class Dither:
    """`values` -> `seed`, `step` float32 [1] and `codes` uint8: round(v / step + u) with u uniform from the seed, which the
    decoder subtracts again, so that the error is independent of the input (Roberts 1962; federated: arXiv 2006.03262).

    A step is `relative` times the root of the mean square. Levels beyond ±127 are cut off.
    """

    relative: float = 1.0
    id: ClassVar[str] = "dither"
    kind: ClassVar[Literal["fields"]] = "fields"

    def __post_init__(self) -> None:
        if not 0.01 <= self.relative <= 1000:
            raise ValueError("relative must lie between 0.01 and 1000")

    def emits(self, like: Shape) -> Shape:
        size = expect(like, "values", "float32").length
        one = FieldShape("float32", 1)
        return {"seed": FieldShape("uint64", 1), "step": one, "codes": FieldShape("uint8", size)}

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        values, seed = x["values"], chance.seed_of(x["values"])
        step = np.float32(self.relative * np.sqrt(np.square(values, dtype=np.float64).mean()))
        ratio = values / step if step > 0 else np.zeros_like(values)
        levels = np.clip(np.rint(ratio + _shift(int(seed), len(values))), -HIGHEST, HIGHEST)
        return {"seed": np.array([seed]), "step": np.array([step]), "codes": _folded(levels)}, {}

    def decode(self, y: Fields, like: Shape) -> Fields:
        shift = _shift(int(y["seed"][0]), like["values"].length)
        return {"values": (_unfolded(y["codes"]) - shift) * np.float32(y["step"][0])}


@dataclasses.dataclass(frozen=True)
class Ternary:
    """`values` -> `scales` float16 [blocks] and `codes` uint8 0, 1 or 2: what is above 0.7 times the mean magnitude of its block,
    as ± the mean of what is above (arXiv 1605.04711)."""

    block: int = 4096
    id: ClassVar[str] = "ternary"
    kind: ClassVar[Literal["fields"]] = "fields"

    def __post_init__(self) -> None:
        check_block(self.block, 1 << 20)

    def emits(self, like: Shape) -> Shape:
        size = expect(like, "values", "float32").length
        return {"scales": FieldShape("float16", -(-size // self.block)), "codes": FieldShape("uint8", size)}

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        values = x["values"]
        magnitudes = np.abs(blocks(values, self.block))
        kept = magnitudes > 0.7 * magnitudes.mean(axis=1, keepdims=True, dtype=np.float64)
        scales = half((magnitudes * kept).sum(axis=1, dtype=np.float64) / np.maximum(1, kept.sum(axis=1)))
        flat = kept.reshape(-1)[: len(values)]
        return {"scales": scales, "codes": _folded(np.where(flat, np.sign(values), 0))}, {}

    def decode(self, y: Fields, like: Shape) -> Fields:
        if (y["codes"] > 2).any():
            raise PayloadError(Reason.BAD_PAYLOAD, "a code beyond 2 where three are")
        scales = np.repeat(y["scales"].astype(np.float32), self.block)[: like["values"].length]
        return {"values": _unfolded(y["codes"]) * scales}


def _shift(seed: int, count: int) -> Array:
    return chance.uniform(seed, count) - np.float32(0.5)


def _folded(levels: Array) -> Array:
    """0, 1, -1, 2, -2 … as 0, 1, 2, 3, 4 …: uint8."""
    whole = levels.astype(np.int64)
    return np.where(whole > 0, 2 * whole - 1, -2 * whole).astype(np.uint8)


def _unfolded(codes: Array) -> Array:
    whole = codes.astype(np.int64)
    return np.where(whole % 2 == 1, (whole + 1) // 2, -(whole // 2)).astype(np.float32)
