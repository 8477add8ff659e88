"""The ledger over any SQL engine: each method is one transaction of `offers`, `updates` or `runs`, run by a group commit."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from coordinator.rounds import Round
from coordinator.stores import Ask, Offers, Run, deletions, offers, rows, runs, updates
from coordinator.stores.connection import Connection
from coordinator.stores.group_commit import GroupCommit
from coordinator.stores.status import run_status
from wire.delta import Layout
from wire.errors import EdgetuneError, Reason
from wire.messages import Contribution, Control, Receipt, ReleaseManifest, RunStatus
from wire.run_spec import RunSpec

T = TypeVar("T")
Clock = Callable[[Connection], int]
"""The store's clock in microseconds, asked inside a transaction."""


class SqlLedger:
    """See `coordinator.stores.Ledger`. `writes` and `reads` may be one; rows add how a change by another is noticed."""

    def __init__(self, writes: GroupCommit, reads: GroupCommit, clock_us: Clock) -> None:
        self._writes, self._reads, self._clock_us = writes, reads, clock_us

    async def _read(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.wrap_future(self._reads.submit(lambda db: work(db, *args)))

    async def _read_now(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.wrap_future(self._reads.submit(lambda db: work(db, *args, self._clock_us(db))))

    async def _write(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.wrap_future(self._writes.submit(lambda db: work(db, *args)))

    async def _write_now(self, work: Callable[..., T], *args: Any) -> T:
        """As `_write`, with the clock read inside the transaction."""
        return await asyncio.wrap_future(self._writes.submit(lambda db: work(db, *args, self._clock_us(db))))

    async def _name(self, blobs: Iterable[str], since_us: int | None, work: Callable[..., T], *args: Any) -> T:
        """As `_write_now`, for rows that name blobs."""

        def unless_deleted(db: Connection, now_us: int) -> T:
            deletions.check(db, blobs, since_us, now_us)
            return work(db, *args, now_us)

        return await self._write_now(unless_deleted)

    async def create_run(
        self, spec: RunSpec, layout: Layout, release: ReleaseManifest, since_us: int | None = None
    ) -> None:
        await self._name(release.blobs, since_us, runs.create_run, spec, layout, release)

    async def run(self, name: str) -> Run:
        return await self._read(rows.read_run, name)

    async def status(self, name: str) -> RunStatus:
        return await self._read(run_status, name)

    async def names(self) -> list[str]:
        return await self._read(rows.names)

    async def control(self, name: str, action: Control, reason: str) -> None:
        await self._write_now(runs.control, name, action, reason)

    async def offer(self, device: str, runs: tuple[str, ...]) -> Offers:
        return await self._write_now(offers.offer, Ask(device, runs))

    async def offer_together(self, asks: Sequence[Ask]) -> list[Offers | EdgetuneError]:
        return await self._write_now(offers.offer_together, asks)

    async def leave(self, device: str, run: str, number: int, attempt: int) -> None:
        await self._write_now(offers.leave, device, run, number, attempt)

    async def check(self, contribution: Contribution) -> Receipt | None:
        return await self._read_now(updates.check, contribution)

    async def accept(self, contribution: Contribution, since_us: int | None = None) -> Receipt:
        return await self._name([contribution.digest], since_us, updates.accept, contribution)

    async def refuse(self, run: str, reason: Reason) -> None:
        await self._write(runs.refuse, run, reason)

    async def tick(self) -> list[tuple[str, Round]]:
        return await self._write_now(runs.tick)

    async def sealed(self) -> list[tuple[str, Round]]:
        return await self._read(runs.sealed)

    async def rounds_by_state(self) -> dict[str, int]:
        return await self._read(runs.rounds_by_state)

    async def contributions(self, run: str, number: int, attempt: int) -> list[Contribution]:
        return await self._read(rows.contributions, run, number, attempt)

    async def publish(self, run: str, sealed: Round, release: ReleaseManifest, since_us: int | None = None) -> bool:
        return await self._name(release.blobs, since_us, runs.publish, run, sealed, release)

    async def fail(self, run: str, sealed: Round, detail: str) -> bool:
        return await self._write_now(runs.fail, run, sealed, detail)

    async def release(self, run: str, version: int | None) -> ReleaseManifest:
        return await self._read(rows.read_release, run, version)

    async def attempt(self, run: str, version: int) -> int:
        return await self._read(rows.attempt, run, version)

    async def named_blobs(self) -> set[str]:
        return await self._read(deletions.named)

    async def transact(self, work: Callable[[Connection, int], T]) -> T:
        return await self._write_now(work)

    async def now_us(self) -> int:
        return await self._read_now(lambda _, now_us: now_us)

    async def look(self, work: Callable[[Connection, int], T]) -> T:
        return await self._read_now(work)

    async def close(self) -> None:
        for thread in {self._writes, self._reads}:
            await asyncio.to_thread(thread.stop)
