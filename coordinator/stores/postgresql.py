"""The shared ledger: PostgreSQL 15 or newer, for any number of processes on any number of machines.

Transactions that write are SERIALIZABLE and take one table lock first, in which they wait for each other as SQLite's do:
nothing is computed on rows that another replica is changing, so none is computed in vain. No accept can land
after the seal, because none can be under way beside it. What the engine aborts all the same (40001, 40P01) is run again.
A connection that is lost is opened again and its transaction repeated: whether or not the first COMMIT arrived, the
outcome is the same, because every transaction is idempotent. A replica that is stopped in the middle of one holds the
others up for `STALLED_S` at most; then the server undoes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import Any, Final, LiteralString, cast
from urllib.parse import parse_qsl

import psycopg
from psycopg import errors
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from coordinator.stores import schema, without_secrets
from coordinator.stores.connection import Connection
from coordinator.stores.group_commit import GroupCommit
from coordinator.stores.sql_ledger import Clock, SqlLedger
from wire.errors import MachineError, Reason, Refused, StoreError, UserError

OLDEST = 150_000
STALLED_S = 10
CHANNEL: Final = "edgetune"
MIGRATION_LOCK = 0x6564_6765
"""Held while a schema is made or migrated: the table that is locked otherwise may not be there yet."""
CONFLICT_PAUSE_S, RECONNECT_PAUSE_S = 0.02, 0.5
DEFAULTS = {
    "connect_timeout": "5",
    "keepalives_idle": "10",
    "keepalives_interval": "3",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
    "application_name": "edgetune",
}
CONFLICTS = (errors.SerializationFailure, errors.DeadlockDetected, errors.LockNotAvailable)
LOST = ("08", "57P", "25P03", "53300")
"""SQLSTATEs, by their beginning, of a server that went away, is not up yet, or has no connection left."""
UNHEARD = ("INSERT INTO upload", "UPDATE uploads", "DELETE FROM upload")
"""Nobody waits for the parts of an upload, and there are many: other replicas are not told of them."""
WORK = (
    "INSERT INTO rounds",
    "INSERT INTO releases",
    "UPDATE runs",
    "UPDATE assignments SET state = 'left'",
    "DELETE FROM contributions",
)
"""What can give devices that wait something to do: a round that opens, a run that ends, a place that is free again."""
QUIET: Final = "quiet"
"""Said of a transaction without any such; one of an older replica says nothing, and may be either."""
WRITE = "BEGIN ISOLATION LEVEL SERIALIZABLE; LOCK TABLE schema_version IN EXCLUSIVE MODE"
READ = "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"


def server_clock_us(db: Connection) -> int:
    """The store's clock: the database's, so that replicas with other clocks agree on every deadline."""
    return int(db.execute("SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint").fetchone()[0])


def _lost(error: Exception) -> bool:
    if not isinstance(error, psycopg.Error):
        return False
    if error.sqlstate is None:  # libpq's own
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError)
    return error.sqlstate.startswith(LOST)


def _conninfo(url: str) -> str:
    """The URL as libpq takes it. Its own complaint would quote the password."""
    if unknown := _unknown_option(url):
        raise UserError(f"{without_secrets(url)}: libpq knows no option {unknown!r}; as ?sslmode=require, for example")
    try:
        return make_conninfo(**(DEFAULTS | cast(dict[str, str], conninfo_to_dict(url))))
    except psycopg.Error:
        raise UserError(
            f"{without_secrets(url)}: not a URL of PostgreSQL: postgresql://USER@HOST:PORT/DATABASE"
        ) from None


def _unknown_option(url: str) -> str | None:
    """The first name in the URL's query that libpq does not know; None, too, where it may be part of a password."""
    options = url.partition("?")[2]
    known = {option.keyword.decode() for option in psycopg.pq.Conninfo.get_defaults()} | {"ssl"}
    names = [name for name, _ in parse_qsl(options, keep_blank_values=True)] if "@" not in options else []
    return next((name for name in names if name not in known), None)


class _Session:
    """`url` holds the password: it goes to libpq and nowhere else."""

    errors = psycopg.Error

    def __init__(self, url: str, begin: LiteralString, speaker: str) -> None:
        self._conninfo, self._begin, self._speaker = _conninfo(url), begin, speaker
        self._db: psycopg.Connection[tuple[Any, ...]] = self._connect()
        self._changed = self._work = False

    def _connect(self) -> psycopg.Connection[tuple[Any, ...]]:
        db = psycopg.connect(self._conninfo, autocommit=True)
        db.execute(f"SET idle_in_transaction_session_timeout = '{STALLED_S}s'")
        db.execute(f"SET lock_timeout = '{STALLED_S}s'")
        if db.execute("SHOW synchronous_commit").fetchone() in (("off",), ("local",)):
            db.execute("SET synchronous_commit = on")  # a receipt promises that the row survives
        return db

    def prepare(self, place: str, create: bool) -> None:
        """Make or migrate the schema, in one transaction."""
        if self._db.info.server_version < OLDEST:
            raise MachineError(f"{place}: PostgreSQL {self._db.info.server_version // 10_000}; 15 or newer is needed")
        if not create and self._db.execute("SELECT to_regclass('schema_version')").fetchone() == (None,):
            raise UserError(f"{place}: no coordinator's store here")
        with self._db.transaction():
            self._db.execute("SELECT pg_advisory_xact_lock(%s)", (MIGRATION_LOCK,))
            self._db.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)")
            row = self._db.execute("SELECT version FROM schema_version").fetchone()
            if row is None:
                self._db.execute("INSERT INTO schema_version VALUES (0)")
            held = row[0] if row else 0
            if (version := schema.migrate(self, held, place)) != held:
                self._db.execute("UPDATE schema_version SET version = %s", (version,))

    def execute(self, statement: str, values: Sequence[Any] = (), /) -> psycopg.Cursor[tuple[Any, ...]]:
        self._changed |= statement.startswith(("INSERT", "UPDATE", "DELETE")) and not statement.startswith(UNHEARD)
        self._work |= statement.startswith(WORK)
        return self._db.execute(statement.replace("?", "%s").encode(), values or None)

    def begin(self) -> None:
        if self._db.closed:
            self._db = self._connect()
        self._changed = self._work = False
        self._db.execute(self._begin)

    def commit(self) -> None:
        if self._changed:
            said = self._speaker if self._work else f"{self._speaker} {QUIET}"
            self._db.execute("SELECT pg_notify(%s, %s)", (CHANNEL, said))
        self._db.execute("COMMIT")

    def rollback(self) -> None:
        try:
            self._db.execute("ROLLBACK")
        except psycopg.Error:
            self._db.close()

    def close(self) -> None:
        self._db.close()

    def again(self, error: Exception) -> float | None:
        if isinstance(error, CONFLICTS):
            return CONFLICT_PAUSE_S
        return RECONNECT_PAUSE_S if _lost(error) else None

    def spoils(self, error: Exception) -> bool:
        return isinstance(error, psycopg.OperationalError | psycopg.InterfaceError | psycopg.InternalError)

    def explained(self, error: Exception) -> Exception:
        if isinstance(error, errors.DiskFull):
            return Refused(Reason.DISK_FULL, "the database's disk is full")
        if isinstance(error, errors.DataError):
            return Refused(Reason.BAD_REQUEST, "a value that the ledger cannot hold")
        if isinstance(error, CONFLICTS):
            return Refused(Reason.BUSY, "the database is busy; try again")
        if _lost(error):
            return Refused(Reason.BUSY, "the database does not answer; try again")
        return StoreError(f"ledger: {_said(error)}")


def _said(error: Exception) -> str:
    """The first line of what the server or libpq says; neither quotes a password."""
    primary = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    return primary or str(error).strip().partition("\n")[0]


class PostgresLedger(SqlLedger):
    """See `coordinator.stores.Ledger`. Raises MachineError where there is no such database."""

    def __init__(self, url: str, clock_us: Clock = server_clock_us, create: bool = True) -> None:
        self._speaker, self._url = uuid.uuid4().hex, url
        with contextlib.ExitStack() as unless_ready:
            try:
                writes = _Session(url, WRITE, self._speaker)
                unless_ready.callback(writes.close)
                writes.prepare(without_secrets(url), create)
                reads = _Session(url, READ, self._speaker)
            except psycopg.Error as error:
                raise MachineError(f"{without_secrets(url)}: cannot keep a ledger here: {_said(error)}") from None
            unless_ready.pop_all()
        super().__init__(GroupCommit(writes, "ledger writes"), GroupCommit(reads, "ledger reads"), clock_us)

    async def others(self) -> AsyncIterator[bool]:
        while True:
            with contextlib.suppress(psycopg.Error):  # what was missed meanwhile is looked for below
                async with await psycopg.AsyncConnection.connect(_conninfo(self._url), autocommit=True) as db:
                    await db.execute(f"LISTEN {CHANNEL}")
                    async for note in db.notifies():
                        speaker, _, kind = note.payload.partition(" ")
                        if speaker != self._speaker:
                            yield kind != QUIET
            await asyncio.sleep(RECONNECT_PAUSE_S)
            yield True
