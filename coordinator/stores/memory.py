"""Blobs in memory: the smallest implementation of the protocol, for tests and for what need not outlive a process."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator

from wire.errors import Reason, Refused


class _MemoryWriter:
    def __init__(self, kept: dict[str, bytes], digest: str | None, size: int) -> None:
        self._kept, self._digest, self._size = kept, digest, size
        self._data = bytearray()

    def write(self, data: bytes | memoryview) -> None:
        self._data += data
        if len(self._data) > self._size:
            raise Refused(Reason.BAD_SIZE, f"more than the declared {self._size} bytes arrived")

    def commit(self) -> str:
        digest = hashlib.sha256(self._data).hexdigest()
        if len(self._data) != self._size:
            raise Refused(Reason.BAD_SIZE, f"{len(self._data)} of the declared {self._size} bytes arrived")
        if self._digest is not None and digest != self._digest:
            raise Refused(Reason.BAD_DIGEST, "the bytes do not have the declared SHA-256")
        self._kept[digest] = bytes(self._data)
        return digest


class MemoryBlobs:
    """See `coordinator.stores.Blobs`."""

    def __init__(self) -> None:
        self._kept: dict[str, bytes] = {}

    @contextlib.contextmanager
    def writer(self, digest: str | None, size: int) -> Iterator[_MemoryWriter]:
        yield _MemoryWriter(self._kept, digest, size)

    def put(self, data: bytes | memoryview) -> str:
        with self.writer(None, len(data)) as writer:
            writer.write(data)
            return writer.commit()

    def get(self, digest: str) -> memoryview:
        try:
            return memoryview(self._kept[digest])
        except KeyError as error:
            raise Refused(Reason.UNKNOWN_BLOB, f"no blob {digest[:12]}…") from error

    def size(self, digest: str) -> int:
        return len(self.get(digest))

    def digests(self) -> Iterator[str]:
        return iter(list(self._kept))
