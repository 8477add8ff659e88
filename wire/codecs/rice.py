"""Rice stage: ascending positions as gaps, each gap as a unary quotient and a few plain bits (Rice 1979)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from wire.codecs import Array, Fields, FieldShape, Shape, State, expect
from wire.errors import PayloadError, Reason


@dataclasses.dataclass(frozen=True)
class Rice:
    """`positions` uint32 [k] below n -> `remainders`, k times b bits, and `quotients`, in unary, both as bytes.

    A gap is the number of positions skipped. Its quotient by 2^b is that many 0 bits and a 1. b follows from n and k
    alone, so it is not sent.
    """

    id: ClassVar[str] = "rice"
    kind: ClassVar[Literal["fields"]] = "fields"

    def emits(self, like: Shape) -> Shape:
        positions = expect(like, "positions", "uint32")
        count, below = positions.length, positions.below
        width = remainder_bits(count, below)
        longest = count + ((below - count) >> width)
        rest = {name: shape for name, shape in like.items() if name != "positions"}
        remainders = FieldShape("uint8", _bytes(count * width))
        return {**rest, "remainders": remainders, "quotients": FieldShape("uint8", _bytes(longest), bounded=True)}

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        positions = x["positions"].astype(np.int64)
        width = remainder_bits(len(positions), like["positions"].below)
        gaps = np.diff(positions, prepend=-1) - 1
        ones = np.cumsum((gaps >> width) + 1) - 1
        unary = np.zeros(ones[-1] + 1, np.uint8)
        unary[ones] = 1
        plain = (gaps[:, None] >> np.arange(width - 1, -1, -1)) & 1
        rest = {name: field for name, field in x.items() if name != "positions"}
        remainders = np.packbits(plain.astype(np.uint8).reshape(-1))
        return {**rest, "remainders": remainders, "quotients": np.packbits(unary)}, {}

    def decode(self, y: Fields, like: Shape) -> Fields:
        count, below = like["positions"].length, like["positions"].below
        width = remainder_bits(count, below)
        gaps = (_quotients(y["quotients"], count) << width) | _remainders(y["remainders"], count, width)
        positions = np.cumsum(gaps + 1) - 1
        if positions[-1] >= below:
            raise PayloadError(Reason.BAD_PAYLOAD, "a position lies beyond the layout")
        rest = {name: field for name, field in y.items() if name not in ("remainders", "quotients")}
        return {**rest, "positions": positions.astype(np.uint32)}


def remainder_bits(count: int, below: int) -> int:
    """b: the power of two next below ln 2 * (mean gap), in integers so that both ends agree.

    >>> [remainder_bits(k, 1000) for k in (1, 10, 50, 250, 1000)]
    [9, 6, 3, 1, 0]
    """
    return max(0, ((below - count) * 177 // (count * 256)).bit_length() - 1)


def _quotients(packed: Array, count: int) -> Array:
    bits = np.unpackbits(packed)
    ones = np.flatnonzero(bits)
    if len(ones) != count or len(bits) - ones[-1] > 8:
        raise PayloadError(Reason.BAD_PAYLOAD, f"expected {count} positions and less than a byte of padding")
    return np.diff(ones, prepend=-1) - 1


def _remainders(packed: Array, count: int, width: int) -> Array:
    bits = np.unpackbits(packed)
    if bits[count * width :].any():
        raise PayloadError(Reason.BAD_PAYLOAD, "the padding after the positions is not zero")
    table = bits[: count * width].reshape(count, width).astype(np.int64)
    values: Array = table @ (1 << np.arange(width - 1, -1, -1, dtype=np.int64))
    return values


def _bytes(bits: int) -> int:
    return -(-bits // 8)
