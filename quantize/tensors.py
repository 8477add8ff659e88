"""safetensors files, read through a memory map and written as a stream: never more than one tensor in memory."""

from __future__ import annotations

import json
import mmap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from quantize.errors import QuantizeError

Array = npt.NDArray[Any]
DTYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "I8": "i1", "F64": "<f8", "I32": "<i4", "I64": "<i8"}
"""safetensors dtype -> numpy dtype; BF16 as its bit pattern."""
MAX_HEADER_BYTES = 100 << 20
Declared = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name -> (safetensors dtype, shape)."""


class SafeTensors:
    """The tensors of one file. Raises QuantizeError for a file that is not well-formed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise QuantizeError(f"{path}: cannot be read: {error}") from error
        self._start, self._entries = self._header()

    def _header(self) -> tuple[int, dict[str, Any]]:
        size = int.from_bytes(self._data[:8], "little")
        if size > min(MAX_HEADER_BYTES, len(self._data) - 8):
            raise QuantizeError(f"{self.path}: damaged, or not a safetensors file")
        try:
            table = json.loads(self._data[8 : 8 + size])
            self.metadata: dict[str, str] = dict(table.pop("__metadata__", {}))
            for name, entry in table.items():
                self._check(name, entry, len(self._data) - 8 - size)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise QuantizeError(f"{self.path}: damaged, or not a safetensors file: {error}") from error
        return 8 + size, table

    @staticmethod
    def _check(name: str, entry: Any, available: int) -> None:
        begin, end = entry["data_offsets"]
        wanted = int(np.prod(entry["shape"], dtype=np.int64)) * np.dtype(DTYPES[entry["dtype"]]).itemsize
        if not 0 <= begin <= end <= available or end - begin != wanted:
            raise ValueError(f"tensor {name!r} lies outside the file")

    def names(self) -> list[str]:
        """In the order in which they lie in the file."""
        return sorted(self._entries, key=lambda name: self._entries[name]["data_offsets"][0])

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._entries[name]["shape"])

    def dtype(self, name: str) -> str:
        return str(self._entries[name]["dtype"])

    def give_back(self) -> None:
        """Let go of the pages that were read, where the system takes such advice: they come again when touched."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._data.madvise(mmap.MADV_DONTNEED)

    def offset(self, name: str) -> int:
        """Where a tensor's first byte lies in the file."""
        return self._start + int(self._entries[name]["data_offsets"][0])

    def read(self, name: str) -> Array:
        """A view of the map, not writable: pages come from the disk when they are touched."""
        entry = self._entries[name]
        begin, end = entry["data_offsets"]
        view = memoryview(self._data)[self._start + begin : self._start + end]
        return np.frombuffer(view, DTYPES[entry["dtype"]]).reshape(entry["shape"])


def write(path: Path, declared: Declared, tensors: Iterable[Array], metadata: Mapping[str, str] | None = None) -> None:
    """A file of the `declared` tensors, whose values `tensors` yields in the same order, and of some `metadata`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    at = 0
    for name, (dtype, shape) in declared.items():
        size = int(np.prod(shape, dtype=np.int64)) * np.dtype(DTYPES[dtype]).itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (dtype, shape)), tensor in zip(declared.items(), tensors, strict=True):
            if tensor.shape != shape or tensor.dtype != np.dtype(DTYPES[dtype]):
                raise ValueError(f"{name}: declared {dtype} {shape}, got {tensor.dtype} {tensor.shape}")
            file.write(np.ascontiguousarray(tensor).data)
