"""The embedded ledger: SQLite in WAL mode with full sync, one writer thread per process, group commit.

A commit costs one fsync (milliseconds), so the writer takes whatever requests wait, runs each under its own savepoint
in one transaction, and answers them together once that is durable. Other processes may write too: BEGIN IMMEDIATE with
a jittered retry keeps the wait fair where SQLite's own busy handler is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import queue
import random
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from coordinator.rounds import Round
from coordinator.stores import Offers, Run, transactions
from coordinator.stores.status import run_status
from wire.delta import Layout
from wire.errors import MachineError, Reason, Refused, StoreError
from wire.messages import Contribution, Receipt, ReleaseManifest, RunStatus
from wire.run_spec import RunSpec

T = TypeVar("T")
SCHEMA_VERSION = 1
GROUP = 64
"""Requests answered by one commit at most."""
BUSY_FOR_S = 30.0


@dataclasses.dataclass
class _Job:
    work: Callable[[sqlite3.Connection], Any]
    answer: Future[Any]


class _Writer(threading.Thread):
    """Owns the connection. Jobs go in by `submit`, answers come back as futures after the commit."""

    def __init__(self, path: Path) -> None:
        super().__init__(name="ledger", daemon=True)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._db = _open(path)
        self.start()

    def submit(self, work: Callable[[sqlite3.Connection], T]) -> Future[T]:
        answer: Future[T] = Future()
        self._jobs.put(_Job(work, answer))
        return answer

    def stop(self) -> None:
        self._jobs.put(None)
        self.join()

    def run(self) -> None:
        while batch := self._take():
            self._commit(batch)
        self._db.close()

    def _take(self) -> list[_Job]:
        """All that waits, at least one job; empty when it is time to stop."""
        batch: list[_Job] = []
        job = self._jobs.get()
        while job is not None:
            batch.append(job)
            if len(batch) == GROUP or self._jobs.empty():
                return batch
            job = self._jobs.get()
        if batch:
            self._jobs.put(None)
        return batch

    def _commit(self, batch: list[_Job]) -> None:
        try:
            _begin(self._db)
            outcomes = [_attempt(self._db, job.work) for job in batch]
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):  # nothing to roll back if BEGIN itself failed
                self._db.execute("ROLLBACK")
            outcomes = [_as_ours(error)] * len(batch)
        for job, outcome in zip(batch, outcomes, strict=True):
            if job.answer.cancelled():
                continue
            if isinstance(outcome, BaseException):
                job.answer.set_exception(outcome)
            else:
                job.answer.set_result(outcome)


def _open(path: Path) -> sqlite3.Connection:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_FOR_S)
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA synchronous = FULL")
        db.execute("PRAGMA foreign_keys = ON")
        _begin(db)
        _migrate(db, path)
        db.execute("COMMIT")
        db.execute("PRAGMA busy_timeout = 0")
    except (OSError, sqlite3.Error) as error:
        raise MachineError(f"{path}: cannot keep a ledger here: {error}") from error
    return db


def _migrate(db: sqlite3.Connection, path: Path) -> None:
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if version > SCHEMA_VERSION:
        raise MachineError(f"{path}: written by a newer edgetune (schema {version}); upgrade this one")
    if version == 0:
        _execute(db, "schema.sql")
        db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    _execute(
        db, "schema_identity.sql"
    )  # a ledger from before has none of these tables; where they are, nothing happens


def _execute(db: sqlite3.Connection, script: str) -> None:
    text = resources.files("coordinator.stores").joinpath(script).read_text(encoding="utf-8")
    for statement in text.split(";\n"):
        db.execute(statement)


def _begin(db: sqlite3.Connection) -> None:
    give_up = time.monotonic() + BUSY_FOR_S
    while True:
        try:
            db.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > give_up:
                raise
            time.sleep(random.uniform(0.001, 0.01))  # jitter, not a secret


def _attempt(db: sqlite3.Connection, work: Callable[[sqlite3.Connection], Any]) -> Any:
    """The job's result, or the exception that undid it and it alone."""
    db.execute("SAVEPOINT job")
    try:
        result = work(db)
    except sqlite3.OperationalError:  # disk full, I/O error: the whole transaction is in doubt
        raise
    except Exception as error:  # whatever it is, the caller that asked for this job gets it
        db.execute("ROLLBACK TO job")
        result = error
    db.execute("RELEASE job")
    return result


def _as_ours(error: sqlite3.Error) -> Exception:
    if "full" in str(error):
        return Refused(Reason.DISK_FULL, "the coordinator's disk is full")
    if "locked" in str(error):
        return Refused(Reason.BUSY, "the ledger is busy")
    return StoreError(f"ledger: {error}")


def system_clock_us() -> int:
    """The store's clock: SQLite serves one host, so it is that host's."""
    return time.time_ns() // 1000


class SqliteLedger:
    """See `coordinator.stores.Ledger`."""

    def __init__(self, path: Path, clock_us: Callable[[], int] = system_clock_us) -> None:
        self._writer, self._clock_us = _Writer(path), clock_us

    async def _do(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.wrap_future(self._writer.submit(lambda db: work(db, *args)))

    async def _do_now(self, work: Callable[..., T], *args: Any) -> T:
        """As `_do`, with the clock read inside the transaction."""
        return await asyncio.wrap_future(self._writer.submit(lambda db: work(db, *args, self._clock_us())))

    async def create_run(self, spec: RunSpec, layout: Layout, release: ReleaseManifest) -> None:
        await self._do_now(transactions.create_run, spec, layout, release)

    async def run(self, name: str) -> Run:
        return await self._do(transactions.read_run, name)

    async def status(self, name: str) -> RunStatus:
        return await self._do(run_status, name)

    async def names(self) -> list[str]:
        return await self._do(transactions.names)

    async def offer(self, device: str, runs: tuple[str, ...]) -> Offers:
        return await self._do_now(transactions.offer, device, runs)

    async def leave(self, device: str, run: str, number: int, attempt: int) -> None:
        await self._do_now(transactions.leave, device, run, number, attempt)

    async def check(self, contribution: Contribution) -> Receipt | None:
        return await self._do_now(transactions.check, contribution)

    async def accept(self, contribution: Contribution) -> Receipt:
        return await self._do_now(transactions.accept, contribution)

    async def refuse(self, run: str, reason: Reason) -> None:
        await self._do(transactions.refuse, run, reason)

    async def tick(self) -> list[str]:
        return await self._do_now(transactions.tick)

    async def sealed(self) -> list[tuple[str, Round]]:
        return await self._do(transactions.sealed)

    async def contributions(self, run: str, number: int, attempt: int) -> list[Contribution]:
        return await self._do(transactions.contributions, run, number, attempt)

    async def publish(self, run: str, sealed: Round, release: ReleaseManifest) -> bool:
        return await self._do_now(transactions.publish, run, sealed, release)

    async def release(self, run: str, version: int | None) -> ReleaseManifest:
        return await self._do(transactions.read_release, run, version)

    async def attempt(self, run: str, version: int) -> int:
        return await self._do(transactions.attempt, run, version)

    async def transact(self, work: Callable[[sqlite3.Connection, int], T]) -> T:
        return await self._do_now(work)

    async def close(self) -> None:
        await asyncio.to_thread(self._writer.stop)
