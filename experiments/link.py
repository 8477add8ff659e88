"""A slow link between real processes: TCP on loopback through a token bucket each way, late by a round trip, cut now and then."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import threading
from types import TracebackType

import numpy as np

CHUNK = 1 << 14
"""Bytes read at a time."""
BURST = 4 * CHUNK
"""Bytes that may pass at once after a pause: what a home router's queue holds, and enough to outweigh late timers."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """What a link does. Rates in bit/s, `round_trip_s` and the mean time between cuts in seconds; never cut where that is 0."""

    up: float
    down: float
    round_trip_s: float = 0.0
    cut_every_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.up > 0 and self.down > 0 and self.round_trip_s >= 0 and self.cut_every_s >= 0):
            raise ValueError("a link needs rates above 0, and times that are not negative")


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A token bucket: `burst` bytes, filled at `bytes_s`. `full_at` is when it is full again, on the caller's clock."""

    bytes_s: float
    burst: int = BURST
    full_at: float = -float("inf")

    def take(self, size: int, now: float) -> tuple[Bucket, float]:
        """The bucket without `size` bytes, and when the last of them has passed."""
        full_at = max(self.full_at, now) + size / self.bytes_s
        return dataclasses.replace(self, full_at=full_at), max(now, full_at - self.burst / self.bytes_s)


class Way:
    """One direction of a link, of all its connections together; it counts bytes as they arrive at the other end."""

    def __init__(self, rate: float, delay_s: float) -> None:
        self._bucket, self._delay_s, self.bytes = Bucket(rate / 8), delay_s, 0

    async def carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        """Everything from `source` to `sink`, until it ends. What has left and not arrived is on its way meanwhile."""
        on_its_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
        arriving = asyncio.create_task(self._arrive(on_its_way, sink))
        try:
            while data := await source.read(CHUNK):
                passed = self._take(len(data))
                await _until(passed)
                on_its_way.put_nowait((passed + self._delay_s, data))
        finally:
            on_its_way.put_nowait((0.0, b""))
            await arriving

    def _take(self, size: int) -> float:
        self._bucket, passed = self._bucket.take(size, asyncio.get_running_loop().time())
        return passed

    async def _arrive(self, on_its_way: asyncio.Queue[tuple[float, bytes]], sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await _next(on_its_way):
                self.bytes += len(data)
                sink.write(data)
                await sink.drain()
            sink.write_eof()


class Link:
    """A port of its own, `address`, that leads to another `address` as `rates` say; in a thread until the `with` block is left.

    Counts what TCP carries, so everything but the headers of its packets. Cuts follow from the seed."""

    def __init__(self, address: str, rates: Rates, seed: int = 0) -> None:
        host, _, port = address.rpartition(":")
        self._to, self._rates = (host, int(port)), rates
        self._up, self._down = Way(rates.up, rates.round_trip_s / 2), Way(rates.down, rates.round_trip_s / 2)
        self._chance = np.random.Generator(np.random.Philox(key=seed))
        self._open = set[asyncio.StreamWriter]()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.cuts = 0

    @property
    def bytes_up(self) -> int:
        return self._up.bytes

    @property
    def bytes_down(self) -> int:
        return self._down.bytes

    def __enter__(self) -> Link:
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._server = starting.result()
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        asyncio.run_coroutine_threadsafe(self._cut_now_and_then(), self._loop)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, near: asyncio.StreamReader, near_writer: asyncio.StreamWriter) -> None:
        ends = {near_writer}
        self._open.add(near_writer)
        with contextlib.suppress(OSError):
            await asyncio.sleep(self._rates.round_trip_s)  # what the handshake takes
            far, far_writer = await asyncio.open_connection(*self._to)
            ends.add(far_writer)
            self._open.add(far_writer)
            await asyncio.gather(self._up.carry(near, far_writer), self._down.carry(far, near_writer))
        self._open -= ends
        for end in ends:
            end.close()

    async def _cut_now_and_then(self) -> None:
        while self._rates.cut_every_s:
            await asyncio.sleep(float(self._chance.exponential(self._rates.cut_every_s)))
            self.cuts += 1
            self._cut()

    def _cut(self) -> None:
        for end in self._open:
            end.transport.abort()

    async def _close(self) -> None:
        self._server.close()
        self._cut()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()
        await asyncio.sleep(0)


async def _until(moment: float) -> None:
    await asyncio.sleep(max(0.0, moment - asyncio.get_running_loop().time()))


async def _next(on_its_way: asyncio.Queue[tuple[float, bytes]]) -> bytes:
    due, data = await on_its_way.get()
    await _until(due)
    return data
