"""Blobs in memory: the smallest implementation of the protocol, for tests and for what need not outlive a process."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from coordinator.stores.declared import Declared
from wire.errors import Reason, Refused


class _MemoryWriter:
    def __init__(self, kept: dict[str, tuple[bytes, float]], declared: Declared) -> None:
        self._kept, self._declared, self._data = kept, declared, bytearray()

    def write(self, data: bytes | memoryview) -> None:
        self._declared.take(data)
        self._data += data

    def commit(self) -> str:
        digest = self._declared.checked()
        self._kept[digest] = (bytes(self._data), time.monotonic())
        return digest


class MemoryBlobs:
    """See `coordinator.stores.Blobs`."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[bytes, float]] = {}

    @contextlib.contextmanager
    def writer(self, digest: str | None, size: int) -> Iterator[_MemoryWriter]:
        yield _MemoryWriter(self._kept, Declared(digest, size))

    def put(self, data: bytes | memoryview) -> str:
        with self.writer(None, len(data)) as writer:
            writer.write(data)
            return writer.commit()

    def grow(self, name: str) -> None:
        """Nothing grows here."""

    def growing(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def get(self, digest: str) -> memoryview:
        try:
            return memoryview(self._kept[digest][0])
        except KeyError as error:
            raise Refused(Reason.UNKNOWN_BLOB, f"no blob {digest[:12]}…") from error

    def size(self, digest: str) -> int:
        return len(self.get(digest))

    def digests(self) -> Iterator[str]:
        return iter(list(self._kept))

    def older(self, than_s: float) -> Iterator[str]:
        now = time.monotonic()
        return iter([digest for digest, (_, since) in self._kept.items() if now - since > than_s])

    def delete(self, digest: str) -> None:
        self._kept.pop(digest, None)

    def free_bytes(self) -> None:
        return None
