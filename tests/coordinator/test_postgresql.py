"""What the shared ledger does when its database, or the way there, fails. A real server; a proxy cuts the way."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from coordinator.stores import group_commit
from coordinator.stores.connection import Connection
from tests.conformance.test_stores import contribution, create, spec, task_of
from tests.servers import Postgres
from wire.errors import MachineError, Reason, Refused, UserError
from wire.messages import Receipt, Task

postgresql = pytest.importorskip("coordinator.stores.postgresql", reason="psycopg is not installed")
Ledger = Any
COHORT = {"goal": 30, "minimum": 1, "deadline_s": 60.0}


class Proxy:
    """TCP to the server's socket. `cut_after` a word in what a client sends: the server gets it, the client no answer."""

    def __init__(self, server: Postgres) -> None:
        self._socket = f"{server.url.partition('host=')[2]}/.s.PGSQL.5432"
        self.cut_after: bytes | None = None
        self.cuts, self._pairs = 0, list[tuple[socket.socket, socket.socket]]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def url(self, schema_url: str) -> str:
        options = schema_url.partition("&")[2]
        return f"postgresql://postgres:secret@127.0.0.1:{self.port}/postgres?{options}"

    def stop(self) -> None:
        """No connection lives on, and none is taken any more."""
        _shut(self._listener)
        for pair in self._pairs:
            for end in pair:
                _shut(end)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.socket(socket.AF_UNIX)
            server.connect(self._socket)
            self._pairs.append((client, server))
            threading.Thread(target=self._forward, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._forward, args=(server, client, False), daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                if up and self.cut_after is not None and self.cut_after in data:
                    self.cut_after, self.cuts = None, self.cuts + 1
                    _shut(source)
                    sink.sendall(data)
                    threading.Event().wait(0.2)  # the server does what it was told
                    break
                sink.sendall(data)
        except OSError:
            pass
        _shut(source)
        _shut(sink)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()


@pytest.fixture
def proxy(postgres_server: Postgres) -> Iterator[Proxy]:
    made = Proxy(postgres_server)
    yield made
    made.stop()


def play(url: str, scene: Callable[[Ledger], Awaitable[None]]) -> None:
    async def run() -> None:
        ledger = postgresql.PostgresLedger(url)
        try:
            await scene(ledger)
        finally:
            await ledger.close()

    asyncio.run(run())


async def tasks(ledger: Ledger, count: int) -> list[tuple[str, Task]]:
    return [(f"d{n:02}", await task_of(ledger, f"d{n:02}")) for n in range(count)]


def test_an_update_whose_commit_got_no_answer_is_counted_once_and_gets_its_receipt(
    proxy: Proxy, postgres_server: Postgres
) -> None:
    async def scene(ledger: Ledger) -> None:
        await create(ledger, spec(cohort=COHORT))
        for device, task in await tasks(ledger, 3):
            proxy.cut_after = b"COMMIT"
            assert (await ledger.accept(contribution(task, device))).device == device
        assert [c.device for c in await ledger.contributions("run", 1, 1)] == ["d00", "d01", "d02"]
        assert (await ledger.status("run")).accepted == proxy.cuts == 3

    play(proxy.url(postgres_server.fresh()), scene)


@pytest.mark.parametrize(
    "word", [b"BEGIN", b"SAVEPOINT", b"INSERT INTO contributions", b"UPDATE rounds", b"RELEASE job"]
)
def test_a_connection_lost_in_the_middle_of_a_transaction_is_opened_again(
    proxy: Proxy, postgres_server: Postgres, word: bytes
) -> None:
    async def scene(ledger: Ledger) -> None:
        await create(ledger, spec(cohort=COHORT))
        [(device, task)] = await tasks(ledger, 1)
        proxy.cut_after = word
        assert (await ledger.accept(contribution(task, device))).device == device
        assert (await ledger.status("run")).accepted == proxy.cuts == 1

    play(proxy.url(postgres_server.fresh()), scene)


def test_a_server_that_ends_connections_all_the_time_costs_no_update(postgres_server: Postgres) -> None:
    async def scene(ledger: Ledger) -> None:
        await create(ledger, spec(cohort=COHORT))
        offered = await tasks(ledger, 30)
        killing = asyncio.create_task(asyncio.to_thread(end_connections, postgres_server))
        receipts: list[Receipt] = []
        for device, task in offered:
            receipts.append(await ledger.accept(contribution(task, device)))
            await asyncio.sleep(0.02)
        assert await killing > 0
        assert [c.device for c in await ledger.contributions("run", 1, 1)] == [r.device for r in receipts]
        assert (await ledger.status("run")).accepted == 30

    play(postgres_server.fresh(), scene)


def end_connections(server: Postgres) -> int:
    ended = 0
    with server.connect() as db:
        for _ in range(8):
            query = "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'edgetune'"
            ended += db.execute(query).fetchone()[0]
            threading.Event().wait(0.1)
    return ended


def test_a_database_that_stays_away_is_said_by_name_within_bounds(
    proxy: Proxy, postgres_server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_commit, "TRY_FOR_S", 1.0)

    async def scene(ledger: Ledger) -> None:
        await create(ledger, spec())
        proxy.stop()
        for call in (ledger.offer("d1", ()), ledger.names()):
            with pytest.raises(Refused, match="the database does not answer") as caught:
                await asyncio.wait_for(call, 10)
            assert caught.value.reason is Reason.BUSY and "secret" not in str(caught.value)

    play(proxy.url(postgres_server.fresh()), scene)


def test_a_transaction_that_the_database_aborts_is_run_again(postgres_server: Postgres) -> None:
    """Somebody else's statements, beside the lock, on the very row: 40001 for the ledger's transaction."""
    url = postgres_server.fresh()

    async def scene(ledger: Ledger) -> None:
        await create(ledger, spec(cohort=COHORT))
        [(device, task)] = await tasks(ledger, 1)
        with postgres_server.connect() as db:
            db.execute(f"SET search_path = {url.rpartition('%3D')[2]}")
            db.execute("BEGIN")
            db.execute("UPDATE rounds SET offered = offered + 1")
            accepting = asyncio.ensure_future(ledger.accept(contribution(task, device)))
            await asyncio.sleep(0.3)
            assert not accepting.done()
            db.execute("COMMIT")
        assert (await accepting).device == device
        status = await ledger.status("run")
        assert (status.accepted, status.offered) == (1, 2)

    play(url, scene)


def test_a_replica_that_stalls_in_a_transaction_holds_the_others_up_for_a_while_and_then_starts_over(
    postgres_server: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(postgresql, "STALLED_S", 1)
    url, tries = postgres_server.fresh(), list[float]()

    def stalling(db: Connection) -> int:
        tries.append(time.monotonic())
        if len(tries) == 1:
            time.sleep(2.0)
        return int(db.execute("SELECT COUNT(*) FROM runs").fetchone()[0])

    async def scene(ledger: Ledger) -> None:
        other = postgresql.PostgresLedger(url)
        await create(ledger, spec())
        stalled = asyncio.ensure_future(ledger._write(stalling))
        await asyncio.sleep(0.1)
        started = time.monotonic()
        await task_of(other, "d1")
        assert 0.5 < time.monotonic() - started < 1.9
        assert (await stalled, len(tries)) == (1, 2)
        await other.close()

    play(url, scene)


def test_the_clock_is_the_database_s(postgres_server: Postgres) -> None:
    async def scene(ledger: Ledger) -> None:
        with postgres_server.connect() as db:
            [(server_us,)] = db.execute("SELECT (extract(epoch FROM clock_timestamp()) * 1e6)::bigint").fetchall()
        ledger_us = await ledger._read(postgresql.server_clock_us)
        assert 0 <= ledger_us - server_us < 5_000_000

    play(postgres_server.fresh(), scene)


def test_a_commit_waits_for_the_disk_even_where_the_database_s_own_setting_would_not(postgres_server: Postgres) -> None:
    async def scene(ledger: Ledger) -> None:
        shown = await ledger._write(lambda db: db.execute("SHOW synchronous_commit").fetchone())
        assert shown == ("on",)

    play(postgres_server.fresh() + "%20-csynchronous_commit%3Doff", scene)


def test_a_server_that_is_too_old_is_refused(postgres_server: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql, "OLDEST", 990_000)
    with pytest.raises(MachineError, match="or newer is needed"):
        postgresql.PostgresLedger(postgres_server.fresh())


def test_a_database_without_a_ledger_is_not_made_one_by_looking(postgres_server: Postgres) -> None:
    url = postgres_server.fresh()
    for _ in range(2):
        with pytest.raises(UserError, match="no coordinator's store here"):
            postgresql.PostgresLedger(url, create=False)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann:hidden@127.0.0.1:1/db",
        "postgresql://ann:hidden@127.0.0.1:port/db",
        "postgresql://ann:hidden@127.0.0.1:1/db?nonsense=hidden",
        "postgresql://ann:hid?hidden@127.0.0.1:1/db",
        "postgresql://127.0.0.1:1/db?password=hid@hidden",
    ],
)
def test_no_error_quotes_a_password(url: str) -> None:
    with pytest.raises((MachineError, UserError)) as caught:
        postgresql.PostgresLedger(url)
    assert "hid" not in str(caught.value)


def test_an_option_that_libpq_does_not_know_is_named() -> None:
    with pytest.raises(UserError, match="no option 'sslmoed'"):
        postgresql.PostgresLedger("postgresql://127.0.0.1:1/db?sslmode=require&sslmoed=x")
