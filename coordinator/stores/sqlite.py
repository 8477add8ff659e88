"""The embedded ledger: SQLite in WAL mode with full sync, for any number of processes of one host.

BEGIN IMMEDIATE with a jittered retry keeps the wait for the one writer fair, where SQLite's own busy handler is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from coordinator.stores import schema
from coordinator.stores.connection import Connection
from coordinator.stores.group_commit import GroupCommit
from coordinator.stores.sql_ledger import Clock, SqlLedger
from wire.durable import make_folder
from wire.errors import MachineError, Reason, Refused, StoreError, UserError

BUSY_FOR_S = 30.0
OURS = {"runs", "releases"}
"""Tables that a ledger has had since the first schema."""
PAUSE_S = 0.01
LOOK_S = 0.2
"""How often a change by another process is looked for: SQLite has no way to be told."""


def system_clock_us(db: Connection) -> int:
    """The store's clock: SQLite serves one host, so it is that host's."""
    return time.time_ns() // 1000


class _Session:
    errors = sqlite3.Error

    def __init__(self, path: Path) -> None:
        try:
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_FOR_S)
            with contextlib.ExitStack() as unless_ready:
                unless_ready.callback(self._db.close)  # and with it goes a migration that is half done
                self._prepare(path)
                unless_ready.pop_all()
        except sqlite3.Error as error:
            raise MachineError(f"{path}: cannot keep a ledger here: {error}") from error

    def _check(self, path: Path) -> None:
        """Raises UserError for a database that another program made, StoreError for one that is damaged."""
        self._db.execute("BEGIN")
        [(held,)] = self._db.execute("PRAGMA user_version").fetchall()
        tables = {
            name for (name,) in self._db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        }
        if bool(held) != bool(tables) or (tables and not tables >= OURS):
            raise UserError(f"{path}: a database of another program; choose another --store")
        [(found,)] = self._db.execute("PRAGMA quick_check(1)").fetchall()
        if found != "ok":
            raise StoreError(f"{path}: the ledger is damaged; put a copy in its place: {' '.join(str(found).split())}")
        self._db.execute("COMMIT")

    def _prepare(self, path: Path) -> None:
        self._check(path)
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        self.begin()
        (held,) = self._db.execute("PRAGMA user_version").fetchone()
        self._db.execute(f"PRAGMA user_version = {schema.migrate(self._db, held, str(path))}")
        self.commit()
        self._db.execute("PRAGMA busy_timeout = 0")

    def execute(self, sql: str, values: Sequence[Any] = (), /) -> sqlite3.Cursor:
        return self._db.execute(sql, values)

    def begin(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def commit(self) -> None:
        self._db.execute("COMMIT")

    def rollback(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # nothing to roll back if BEGIN itself failed
            self._db.execute("ROLLBACK")

    def close(self) -> None:
        self._db.close()

    def again(self, error: Exception) -> float | None:
        return PAUSE_S if "locked" in str(error) else None

    def spoils(self, error: Exception) -> bool:
        return isinstance(error, sqlite3.OperationalError)  # disk full, I/O error

    def explained(self, error: Exception) -> Exception:
        if "full" in str(error):
            return Refused(Reason.DISK_FULL, "the coordinator's disk is full")
        if "locked" in str(error):
            return Refused(Reason.BUSY, "the ledger is busy")
        return StoreError(f"ledger: {error}")


def _make(path: Path) -> None:
    """An empty file, if there is none, for its owner alone: SQLite gives its log the same mode. Raises MachineError."""
    try:
        make_folder(path.parent)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise MachineError(f"{path}: cannot keep a ledger here: {error}") from error


class SqliteLedger(SqlLedger):
    """See `coordinator.stores.Ledger`: `ledger.sqlite` in a folder. Raises MachineError where a ledger cannot be kept."""

    def __init__(self, folder: str | Path, clock_us: Clock = system_clock_us, create: bool = True) -> None:
        path = Path(folder) / "ledger.sqlite"
        if not create and not path.exists():
            raise UserError(f"{folder}: no coordinator's store here; give its folder as --store DIR")
        _make(path)
        thread = GroupCommit(_Session(path))
        super().__init__(thread, thread, clock_us)

    async def others(self) -> AsyncIterator[bool]:
        seen, known = await self._read(_foreign_changes), await self._read(_work)
        while True:
            await asyncio.sleep(LOOK_S)
            if (now := await self._read(_foreign_changes)) != seen:
                seen, before, known = now, known, await self._read(_work)
                yield any(left > before.get(what, -1) for what, left in known.items())


def _foreign_changes(db: Connection) -> int:
    """A number that another one takes the place of when another connection has committed."""
    return int(db.execute("PRAGMA data_version").fetchone()[0])


def _work(db: Connection) -> dict[tuple[object, ...], int]:
    """The seats that each round has left, and the runs as they stand: of what is new or grows, devices may want to hear."""
    seats = "SELECT run, number, attempt, offers - offered FROM rounds WHERE state = 'open' AND paused_us IS NULL"
    runs = "SELECT name, state, decision, (SELECT COUNT(*) FROM releases WHERE run = name) FROM runs"
    rows = [*db.execute(seats).fetchall(), *((*row, 0) for row in db.execute(runs).fetchall())]
    return {tuple(row[:-1]): row[-1] for row in rows}
