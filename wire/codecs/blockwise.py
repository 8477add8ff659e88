"""Blockwise stage: symmetric integers of 4 or 8 bits with one half-precision scale a block."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from wire.codecs import Array, Fields, FieldShape, Shape, State, expect, kernels
from wire.codecs.floats import half
from wire.codecs.kernels import Ints
from wire.errors import PayloadError, Reason

INFINITY = 0x7C00
"""The bits of the half-precision number."""


@dataclasses.dataclass(frozen=True)
class Blockwise:
    """`values` float32 [n] -> `codes` and `scales` float16 [ceil(n / block)]; value = code * scale.

    Codes lie in -(2^(bits-1) - 1) ... 2^(bits-1) - 1. The scale is rounded before the codes are computed, so that an
    entry is off by half a step at most. Four-bit codes are stored as code + 8, two a byte, the earlier in the high half.
    """

    bits: Literal[4, 8] = 4
    block: int = 64
    id: ClassVar[str] = "blockwise"
    kind: ClassVar[Literal["fields"]] = "fields"

    def __post_init__(self) -> None:
        check_block(self.block, 1 << 16)

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    def emits(self, like: Shape) -> Shape:
        length = expect(like, "values", "float32").length
        codes = FieldShape("int8", length) if self.bits == 8 else FieldShape("uint8", -(-length // 2))
        rest = {name: shape for name, shape in like.items() if name != "values"}
        return {"scales": FieldShape("float16", -(-length // self.block)), "codes": codes, **rest}

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        values = x["values"]
        parts = blocks(values, self.block)
        scales = half(np.abs(parts).max(axis=1) / np.float32(self.top))
        steps = scales.astype(np.float32)[:, None]
        ratio = np.divide(parts, steps, out=np.zeros_like(parts), where=steps > 0)
        codes = np.clip(np.rint(ratio), -self.top, self.top).astype(np.int8).reshape(-1)[: len(values)]
        rest = {name: field for name, field in x.items() if name != "values"}
        return {"scales": scales, "codes": codes if self.bits == 8 else _join_nibbles(codes), **rest}, {}

    def decode(self, y: Fields, like: Shape) -> Fields:
        length, scales = like["values"].length, checked_scales(y["scales"]).astype(np.float32)
        codes = y["codes"] if self.bits == 8 else _split_nibbles(y["codes"], length)
        self._check(int(codes.min(initial=0)))
        values = (blocks(codes.astype(np.float32), self.block) * scales[:, None]).reshape(-1)[:length]
        rest = {name: field for name, field in y.items() if name not in ("scales", "codes")}
        return {"values": values, **rest}

    def add(self, y: Fields, like: Shape, total: Ints, fraction_bits: int, weight: int) -> None:
        """total += weight · round(value · 2^fraction_bits), in integers alone: a scale is a whole number of 2^-24, and a code's
        product with it is exact in float32. Raises PayloadError, as late as at the end."""
        scales = checked_scales(y["scales"])
        units = np.empty(len(scales), np.int64)  # in pieces, without fresh memory for every step
        np.multiply(scales, 2.0**fraction_bits * weight, out=units, dtype=np.float64, casting="unsafe")
        kernel = kernels.fastest(len(total))
        if self.bits == 4 and len(total) % 2 and y["codes"][-1] & 15 != 8:
            raise PayloadError(Reason.BAD_PAYLOAD, "the code after the last one is not zero")
        self._check((kernel.add_bytes if self.bits == 8 else kernel.add_nibbles)(total, y["codes"], units, self.block))

    def _check(self, least: int) -> None:
        if least < -self.top:
            raise PayloadError(Reason.BAD_PAYLOAD, "a block has a code out of range")


def check_block(block: int, most: int) -> None:
    """Raises ValueError for a number of entries that share a scale which cannot be."""
    if not 1 <= block <= most:
        raise ValueError(f"block must lie between 1 and {most}")


def checked_scales(scales: Array) -> Array:
    """Raises PayloadError for scales that no encoder writes. Their bits as integers are in the order of their values, what is
    not finite above all that is, what is negative above that."""
    if scales.view(np.uint16).max(initial=0) < INFINITY:
        return scales
    if not np.isfinite(scales).all():
        raise PayloadError(Reason.NOT_FINITE, "a block has a scale that is not a finite number")
    raise PayloadError(Reason.BAD_PAYLOAD, "a block has a negative scale")


def blocks(values: Array, block: int) -> Array:
    """[n] as [ceil(n / block), block], zeros after the end."""
    if padding := -len(values) % block:
        values = np.concatenate([values, np.zeros(padding, values.dtype)])
    return values.reshape(-1, block)


def _join_nibbles(codes: Array) -> Array:
    halves = blocks(codes, 2) + np.int8(8)
    packed: Array = (halves[:, 0].astype(np.uint8) << 4) | halves[:, 1].astype(np.uint8)
    return packed


def _split_nibbles(packed: Array, length: int) -> Array:
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1).astype(np.int8) - np.int8(8)
    if codes[length:].any():
        raise PayloadError(Reason.BAD_PAYLOAD, "the code after the last one is not zero")
    return codes[:length]
