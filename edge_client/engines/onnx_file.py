"""ONNX models as bytes, written here: the format is a few nested messages, and a device needs no package to make them.

Field numbers and types are those of onnx.proto (ONNX 1.17, IR version 10). Tensors stay where they are: a model names
the file, the offset and the length of each (external data), or carries small ones itself.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

IR_VERSION, OPSET = 10, 21
CONTRIB = "com.microsoft"
"""The domain of onnxruntime's own operators."""
TYPES: Mapping[str, int] = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7}
_VARINT, _BYTES, _FIXED32 = 0, 2, 5
_FLOAT, _INT, _INTS = 1, 2, 7
"""Attribute types."""


@dataclasses.dataclass(frozen=True)
class External:
    """A tensor that lies in a file beside the model."""

    file: str
    offset: int
    length: int
    dtype: str
    shape: tuple[int, ...]


class Graph:
    """A graph being written: nodes in order, tensors, inputs and outputs. `add` gives the name of what it computes."""

    def __init__(self, name: str) -> None:
        self._name, self._count = name, 0
        self._nodes: list[bytes] = []
        self._tensors: list[bytes] = []
        self._ends: list[bytes] = []

    def input(self, name: str, dtype: str, shape: Sequence[int | str]) -> str:
        self._ends.append(_message(11, _value(name, dtype, shape)))
        return name

    def output(self, name: str, dtype: str, shape: Sequence[int | str]) -> None:
        self._ends.append(_message(12, _value(name, dtype, shape)))

    def constant(self, array: npt.NDArray[Any]) -> str:
        """A small tensor, carried by the model."""
        name = self._fresh()
        parts = [*(_number(1, n) for n in array.shape), _number(2, TYPES[str(array.dtype)]), _text(8, name)]
        self._tensors.append(_message(5, b"".join(parts) + _message(9, np.ascontiguousarray(array).tobytes())))
        return name

    def external(self, name: str, where: External) -> str:
        entries = {"location": where.file, "offset": str(where.offset), "length": str(where.length)}
        parts = [*(_number(1, n) for n in where.shape), _number(2, TYPES[where.dtype]), _text(8, name)]
        parts += [_message(13, _text(1, key) + _text(2, value)) for key, value in entries.items()]
        self._tensors.append(_message(5, b"".join([*parts, _number(14, 1)])))
        return name

    def add(self, op: str, inputs: Sequence[str], domain: str = "", **attributes: float) -> str:
        """One node with one output."""
        return self.split(op, inputs, 1, domain, **attributes)[0]

    def split(self, op: str, inputs: Sequence[str], outputs: int, domain: str = "", **attributes: float) -> list[str]:
        """One node with several outputs."""
        names = [self._fresh() for _ in range(outputs)]
        parts = [*(_text(1, i) for i in inputs), *(_text(2, o) for o in names), _text(3, names[0]), _text(4, op)]
        parts += [_message(5, _attribute(name, value)) for name, value in attributes.items()]
        self._nodes.append(_message(1, b"".join(parts) + (_text(7, domain) if domain else b"")))
        return names

    def add_transposed(self, given: str) -> str:
        """[K, rows, columns] as [K, columns, rows]."""
        name = self._fresh()
        perm = _text(1, "perm") + b"".join(_number(8, axis) for axis in (0, 2, 1)) + _number(20, _INTS)
        parts = [_text(1, given), _text(2, name), _text(3, name), _text(4, "Transpose"), _message(5, perm)]
        self._nodes.append(_message(1, b"".join(parts)))
        return name

    def rename(self, given: str, name: str) -> str:
        """Give a computed value the name of an output."""
        self._nodes.append(_message(1, _text(1, given) + _text(2, name) + _text(3, name) + _text(4, "Identity")))
        return name

    def model(self) -> bytes:
        """The whole ModelProto."""
        graph = _concatenated(self._nodes) + _text(2, self._name) + _concatenated(self._tensors + self._ends)
        opsets = [_message(8, _text(1, d) + _number(2, v)) for d, v in (("", OPSET), (CONTRIB, 1))]
        return _number(1, IR_VERSION) + _text(2, "edgetune") + _message(7, graph) + b"".join(opsets)

    def _fresh(self) -> str:
        self._count += 1
        return f"v{self._count}"


def _concatenated(parts: Iterable[bytes]) -> bytes:
    return b"".join(parts)


def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3 | _VARINT) + _varint(value)


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | _BYTES) + _varint(len(content)) + content


def _text(field: int, text: str) -> bytes:
    return _message(field, text.encode())


def _attribute(name: str, value: float) -> bytes:
    if isinstance(value, float):
        return _text(1, name) + _varint(2 << 3 | _FIXED32) + struct.pack("<f", value) + _number(20, _FLOAT)
    return _text(1, name) + _number(3, value) + _number(20, _INT)


def _value(name: str, dtype: str, shape: Sequence[int | str]) -> bytes:
    dims = [_message(1, _text(2, d) if isinstance(d, str) else _number(1, d)) for d in shape]
    tensor = _number(1, TYPES[dtype]) + _message(2, b"".join(dims))
    return _text(1, name) + _message(2, _message(1, tensor))
