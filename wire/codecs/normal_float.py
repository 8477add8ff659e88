"""Normal-float stage: 4-bit codes for values that are normal in the mean (NF4, arXiv 2305.14314)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from quantize.formats import NF4
from wire.codecs import Fields, FieldShape, Shape, State, bits, expect, kernels
from wire.codecs.blockwise import blocks, check_block, checked_scales
from wire.codecs.floats import half
from wire.codecs.kernels import Ints
from wire.errors import PayloadError, Reason


@dataclasses.dataclass(frozen=True)
class NormalFloat:
    """`values` -> `scales` float16 [blocks], the largest magnitude of a block, and `codes` of 4 bits, the nearest of 16."""

    block: int = 64
    id: ClassVar[str] = "normal_float"
    kind: ClassVar[Literal["fields"]] = "fields"

    def __post_init__(self) -> None:
        check_block(self.block, 1 << 16)

    def emits(self, like: Shape) -> Shape:
        size = expect(like, "values", "float32").length
        return {
            "scales": FieldShape("float16", -(-size // self.block)),
            "codes": FieldShape("uint8", bits.size(size, 4)),
        }

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        values = blocks(x["values"], self.block)
        scales = half(np.abs(values).max(axis=1))
        steps = scales.astype(np.float32)[:, None]
        ratio = np.divide(values, steps, out=np.zeros_like(values), where=steps > 0)
        codes = np.searchsorted((NF4[1:] + NF4[:-1]) / np.float32(2), ratio.reshape(-1)[: len(x["values"])])
        return {"scales": scales, "codes": bits.packed(codes.astype(np.uint16), 4)}, {}

    def decode(self, y: Fields, like: Shape) -> Fields:
        size = like["values"].length
        scales = np.repeat(checked_scales(y["scales"]).astype(np.float32), self.block)[:size]
        return {"values": NF4[bits.unpacked(y["codes"], 4, size)].astype(np.float32) * scales}

    def add(self, y: Fields, like: Shape, total: Ints, fraction_bits: int, weight: int) -> None:
        """total += weight · round(value · 2^fraction_bits). Raises PayloadError."""
        scales, unit = checked_scales(y["scales"]).astype(np.float32), np.float32(2.0**fraction_bits)
        if len(total) % 2 and y["codes"][-1] & 15:
            raise PayloadError(Reason.BAD_PAYLOAD, "the padding after the last number is not zero")
        levels = NF4.astype(np.float32)
        kernels.fastest(len(total)).add_levels(total, y["codes"], scales, self.block, levels, unit, weight)
