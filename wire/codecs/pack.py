"""Pack: fields to bytes. Little-endian arrays one after the other; only what has no static length is counted."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from wire.codecs import Array, Fields, FieldShape, Shape, State
from wire.errors import PayloadError, Reason

COUNT_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Pack:
    """The fields in their shape's order; before a bounded field, its length as uint32."""

    id: ClassVar[str] = "pack"
    kind: ClassVar[Literal["pack"]] = "pack"

    def emits(self, like: Shape) -> int:
        return sum(f.length * _dtype(f).itemsize + COUNT_BYTES * f.bounded for f in like.values())

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[bytes, State]:
        return b"".join(part for name, shape in like.items() for part in _parts(x[name], shape)), {}

    def decode(self, y: bytes, like: Shape) -> Fields:
        fields: Fields = {}
        rest = memoryview(y)
        for name, shape in like.items():
            fields[name], rest = _take(rest, name, shape)
        if len(rest):
            raise PayloadError(Reason.BAD_PAYLOAD, f"{len(rest)} bytes after the last field")
        return fields


def _dtype(shape: FieldShape) -> np.dtype[np.generic]:
    return np.dtype(shape.dtype).newbyteorder("<")


def _parts(field: Array, shape: FieldShape) -> tuple[bytes, ...]:
    if len(field) > shape.length or (len(field) < shape.length and not shape.bounded):
        raise ValueError(f"a field of {len(field)} entries where its shape says {shape}")
    data = field.astype(_dtype(shape), copy=False).tobytes()
    return (len(field).to_bytes(COUNT_BYTES, "little"), data) if shape.bounded else (data,)


def _take(rest: memoryview, name: str, shape: FieldShape) -> tuple[Array, memoryview]:
    count = shape.length
    if shape.bounded:
        count, rest = int.from_bytes(rest[:COUNT_BYTES], "little"), rest[COUNT_BYTES:]
        if count > shape.length:
            raise PayloadError(Reason.BAD_PAYLOAD, f"{name}: {count} entries, at most {shape.length} can be")
    size = count * _dtype(shape).itemsize
    if len(rest) < size:
        raise PayloadError(Reason.BAD_PAYLOAD, f"{name}: {len(rest)} bytes left, {size} needed")
    return np.frombuffer(rest[:size], _dtype(shape)), rest[size:]
