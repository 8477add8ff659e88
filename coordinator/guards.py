"""What a coordinator takes on at once, so that no caller, slow, greedy or hostile, is in the way of the others.

Bounds are of one process, except where they say of a device: those are kept by the ledger, for all replicas together.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Generic, Protocol, TypeVar

from coordinator.stores import Blobs
from wire.contract import RETRY_AFTER_S
from wire.errors import PayloadError, Reason, Refused
from wire.messages import CHUNK_BYTES


@dataclasses.dataclass(frozen=True)
class Limits:
    """Every bound. Sizes in bytes, times in seconds."""

    part_bytes: int = CHUNK_BYTES
    """The longest part or chunk."""
    stall_s: float = 60.0
    """A sender of whom nothing whole arrives for so long has stalled; what is durable of an upload stays."""
    least_bytes_per_s: float = 4096.0
    """A stream that is slower on average, its first `stall_s` aside, has stalled too."""
    in_flight_bytes: int = 16 << 20
    """Bytes received and not yet durable; what goes beyond is to come again."""
    streams: int = 256
    """Streams of parts open at once."""
    device_parts: int = 2
    """Parts of one device that are being made durable at once."""
    device_uploads: int = 4
    """Uploads that a device may have begun and not committed."""
    device_bytes: int = 2 << 30
    """What they may declare together."""
    keep_s: float = 3600.0
    """An upload to which nothing is added for so long is given up, and its bytes are deleted."""
    disk_reserve_bytes: int = 256 << 20
    """Kept free for combining and publishing: an update that would take of it is to come again."""
    retry_after_s: float = RETRY_AFTER_S
    """When one that is to come again should."""
    full_retry_after_s: float = 30.0
    """The same, where it waits for somebody to make room."""


DEFAULTS = Limits()


class Chunk(Protocol):
    """What a message of a stream is read into."""

    @property
    def data(self) -> bytes: ...


M = TypeVar("M")
C = TypeVar("C", bound=Chunk)


class Arriving(Generic[M, C]):
    """What comes on a stream, as long as it comes fast enough: then STALLED. TOO_LARGE for a chunk that is too long.

    Only the time that the sender takes is counted, not that in which this side is at work. Each message is read once, since
    protobuf copies its bytes whenever they are asked for, and not kept.
    """

    def __init__(self, messages: AsyncIterator[M], read: Callable[[M], C], limits: Limits) -> None:
        self._messages, self._read, self._limits = messages, read, limits
        self._coming: asyncio.Task[C | None] | None = None
        self._waited_s, self._received = 0.0, 0

    async def soon(self, within_s: float) -> bool:
        """Whether the next chunk, or the end, is there within so many seconds."""
        clock_s = asyncio.get_running_loop().time
        began = clock_s()
        if self._coming is None:
            self._coming = asyncio.create_task(self._next())
        await asyncio.wait([self._coming], timeout=within_s)
        self._waited_s += clock_s() - began
        return self._coming.done()

    async def next(self) -> C | None:
        """The next chunk, None at the end."""
        if not await self.soon(self._limits.stall_s) or self._coming is None:
            raise self._stalled()
        coming, self._coming = self._coming, None
        chunk = coming.result()
        if chunk is None:
            return None
        if len(chunk.data) > self._limits.part_bytes:
            raise PayloadError(Reason.TOO_LARGE, f"a part has at most {self._limits.part_bytes} bytes")
        self._received += len(chunk.data)
        if self._received < self._limits.least_bytes_per_s * (self._waited_s - self._limits.stall_s):
            raise self._stalled()
        return chunk

    def close(self) -> None:
        if self._coming is not None:
            self._coming.cancel()

    async def _next(self) -> C | None:
        message = await anext(self._messages, None)
        return None if message is None else self._read(message)

    def _stalled(self) -> Refused:
        return Refused(Reason.STALLED, "bytes come too slowly; go on from what is there")


class Shares:
    """What each name has open now. For one event loop."""

    def __init__(self, most: int) -> None:
        self._most, self._open = most, Counter[str]()

    @contextlib.contextmanager
    def one_of(self, name: str, refused: Refused) -> Iterator[None]:
        """While `name` has one more open. Raises `refused` if it has enough."""
        if self._open[name] >= self._most:
            raise refused
        self._open[name] += 1
        try:
            yield
        finally:
            self._open[name] -= 1
            if not self._open[name]:
                del self._open[name]


class Guards:
    """Limits, and what counts against them now. For one event loop."""

    def __init__(self, limits: Limits, blobs: Blobs) -> None:
        self.limits, self._blobs = limits, blobs
        self._in_flight, self._streams, self._parts = 0, 0, Shares(limits.device_parts)

    @contextlib.contextmanager
    def in_flight(self, size: int) -> Iterator[None]:
        """While `size` bytes are in memory. BUSY if they would be too many; one alone is never too many."""
        if self._in_flight and self._in_flight + size > self.limits.in_flight_bytes:
            raise self._busy("too many bytes are under way")
        self._in_flight += size
        try:
            yield
        finally:
            self._in_flight -= size

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """While a stream of parts is open. BUSY if too many are."""
        if self._streams >= self.limits.streams:
            raise self._busy("too many uploads are under way")
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    def part_of(self, device: str) -> contextlib.AbstractContextManager[None]:
        """While a part of `device` is being made durable. TOO_MANY_UPLOADS if too many are."""
        too_many = f"{device} sends too many parts at once"
        return self._parts.one_of(device, Refused(Reason.TOO_MANY_UPLOADS, too_many, self.limits.retry_after_s))

    def room(self, size: int) -> None:
        """DISK_FULL if `size` more bytes would take of the reserve. Asks the file system: not for the event loop."""
        free, reserve = self._blobs.free_bytes(), self.limits.disk_reserve_bytes
        if free is not None and free - size < reserve:
            raise Refused(
                Reason.DISK_FULL,
                f"the coordinator's disk is almost full: {_mb(free)} free, {_mb(size + reserve)} wanted, of which"
                f" {_mb(reserve)} are kept for publishing; make room there",
                self.limits.full_retry_after_s,
            )

    @contextlib.contextmanager
    def arriving(self, messages: AsyncIterator[M], read: Callable[[M], C]) -> Iterator[Arriving[M, C]]:
        """What comes on a stream, while the context is open."""
        arriving = Arriving(messages, read, self.limits)
        try:
            yield arriving
        finally:
            arriving.close()

    def _busy(self, what: str) -> Refused:
        return Refused(Reason.BUSY, f"{what}; come again", self.limits.retry_after_s)


def _mb(size: int) -> str:
    """Bytes in MB.

    >>> _mb(268_435_456)
    '268.4 MB'
    """
    return f"{size / 1e6:,.1f} MB"


@contextlib.asynccontextmanager
async def turn(places: asyncio.Semaphore, longest_s: float) -> AsyncIterator[None]:
    """One of the places where callers are served at once. Whoever takes longer than `longest_s`, as one who has stopped to
    read, is served on, but no more in the way of others."""
    await places.acquire()
    taken = [places]

    def give_back() -> None:
        if taken:
            taken.pop().release()

    over = asyncio.get_running_loop().call_later(longest_s, give_back)
    try:
        yield
    finally:
        over.cancel()
        give_back()
