"""Seeded bugs: each is a mistake that a coordinator could have been built with. The sweep of single crashes, or schedules of
many faults, must find every one of them; what draws the faults knows nothing of bugs."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable
from typing import Any

from coordinator import closing, publish, rounds, service, threads
from coordinator.rules import Rules
from coordinator.stores import Ledger, files, group_commit, rows, runs, sql_ledger, updates
from coordinator.stores import uploads as stored_uploads
from tests.faults.draws import LANES, Lane
from wire import spec
from wire.messages import Receipt


def row_before_blob() -> None:
    """The row that names a payload is committed before the payload is in its place."""

    async def receive(self: Any, contribution: Any, payload: bytes | None) -> Any:
        receipt = await self._store.ledger.accept(contribution)
        if payload:
            await threads.on(self._core.disk, self._store.blobs.put, payload)
        elif payload is None:
            await self._core.uploads.finish(contribution, await self._core.rules(contribution.run))
        return receipt

    service.Federation._receive = receive  # type: ignore[method-assign]


def receipt_before_commit() -> None:
    """A job is answered when it has run, and not when that is durable."""
    attempt = group_commit.GroupCommit._attempt

    def answered(self: Any, job: Any) -> Any:
        before = _changes(self._session)
        outcome = attempt(self, job.work)
        group_commit._answer(job, outcome)
        if _changes(self._session) != before:
            time.sleep(0.02)  # the time that a sync takes
        return outcome

    def outcomes(self: Any, batch: list[Any]) -> list[Any]:
        self._session.begin()
        done = [answered(self, job) for job in batch]
        self._session.commit()
        return done

    group_commit.GroupCommit._outcomes = outcomes  # type: ignore[method-assign]


def _changes(session: Any) -> int:
    """A number that another one takes the place of when a transaction changes something."""
    return int(session._db.total_changes if hasattr(session._db, "total_changes") else session._changed)


def publish_in_two_transactions() -> None:
    """A release becomes a row in one transaction, and the next round opens in another."""
    insert, opened = rows.insert_round, list[tuple[str, Any]]()
    whole = sql_ledger.SqlLedger.publish

    async def published(self: Any, run: str, sealed: Any, release: Any, since_us: int | None = None) -> bool:
        rows.insert_round = lambda db, name, fresh: opened.append((name, fresh))
        won = await whole(self, run, sealed, release, since_us)
        rows.insert_round = insert
        while opened:
            await self._write(insert, *opened.pop())
        return won

    sql_ledger.SqlLedger.publish = published  # type: ignore[method-assign]


def blob_in_its_place_before_it_is_whole() -> None:
    """A blob is written where it is read, and taken as it is if it is already there."""

    def put(self: Any, data: Any) -> str:
        digest, view = spec.bytes_digest(data), memoryview(data)
        place = self._place(digest)
        place.parent.mkdir(exist_ok=True)
        stepped: Any = vars(files)["os"]
        if not place.exists():
            handle = os.open(place, os.O_CREAT | os.O_WRONLY)
            for half in (view[: len(view) // 2], view[len(view) // 2 :]):
                stepped.write(handle, half)
            os.close(handle)
        return digest

    files.FileBlobs.put = put  # type: ignore[method-assign]


def release_before_its_adapter() -> None:
    """A release is published first, and what it names is stored after."""

    async def close(store: Any, compute: Any, name: str, sealed: Any, who: Any = None) -> None:
        ledger: Ledger = store.ledger
        run, parent = await ledger.run(name), await ledger.release(name, sealed.base_version)
        accepted = await ledger.contributions(name, sealed.number, sealed.attempt)
        made = publish.combine(Rules.of(run.spec, run.layout), parent, accepted, store.blobs)
        await ledger.publish(name, sealed, made.release)
        for blob in made.blobs:
            store.blobs.put(blob)

    closing.close = close


def publish_without_looking() -> None:
    """A closer publishes what it has combined, whether or not somebody else has."""

    def published(db: Any, name: str, done: Any, release: Any, now_us: int) -> bool:
        key = (name, done.number, done.attempt)
        db.execute("UPDATE rounds SET state = 'published' WHERE run = ? AND number = ? AND attempt = ?", key)
        db.execute("DELETE FROM releases WHERE run = ? AND version = ?", (name, release.version))
        rows.insert_release(db, release, done.attempt, now_us)
        made = rounds.step(done, rounds.Publish(), now_us)
        if fresh := rounds.after(rows.read_run(db, name).spec, made, now_us):
            key = (name, fresh.number, fresh.attempt)
            db.execute("DELETE FROM rounds WHERE run = ? AND number = ? AND attempt = ?", key)
            rows.insert_round(db, name, fresh)
        return True

    runs.publish = published


def accept_after_the_seal() -> None:
    """Whether a round is open is asked before the payload is stored, and not once more where it is counted."""

    def accept(db: Any, offered: Any, now_us: int) -> Receipt:
        key = updates._key(offered)
        if db.execute("SELECT 1 FROM contributions" + rows.KEY, key).fetchone() is None:
            live = rows.read_round(db, offered.run, offered.round, offered.attempt)
            landed = (None, None) if live.max_staleness is None else (live.number, 0)
            values = (offered.digest, offered.size, offered.weight, offered.base_digest, offered.release_digest)
            db.execute(
                "INSERT INTO contributions (run, number, attempt, device, digest, size, weight, base_digest,"
                " release_digest, metrics, accepted_us, landed, staleness)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (*key, *values, spec.canonical(offered.metrics).decode(), now_us, *landed),
            )
            db.execute("UPDATE assignments SET state = 'accepted'" + rows.KEY, key)
            if live.state == "open":
                runs.move(db, offered.run, rounds.step(live, rounds.Accept(), now_us), now_us)
        return Receipt(*key[:3], offered.device, offered.digest)

    updates.accept = accept


def offset_from_memory() -> None:
    """A replica believes what it remembers of an upload, and not the ledger, which others write too."""
    ends = dict[str, int]()
    create, find, append = stored_uploads.create, stored_uploads.find, stored_uploads.append

    def remembered(upload: Any) -> Any:
        return dataclasses.replace(upload, received=ends.get(upload.id, upload.received))

    def appended(db: Any, upload: str, start: int, size: int, *more: Any) -> int:
        db.execute("UPDATE uploads SET received = ? WHERE id = ?", (start, upload))
        db.execute("DELETE FROM upload_parts WHERE upload = ? AND start >= ?", (upload, start))
        ends[upload] = start + size  # whether or not this is committed
        return append(db, upload, start, size, *more)

    stored_uploads.create = lambda *given: remembered(create(*given))
    stored_uploads.find = lambda *given: remembered(find(*given))
    stored_uploads.append = appended  # type: ignore[assignment]


def fold_counts_a_repetition() -> None:
    """An update that is sent again because its receipt was lost is folded again."""
    again = dict[tuple[int, int], list[Any]]()
    receive, contributions = service.Federation._receive, sql_ledger.SqlLedger.contributions

    async def received(self: Any, mine: Any, payload: bytes | None) -> Any:
        if await self._store.ledger.check(mine):
            again.setdefault((mine.round, mine.attempt), []).append(mine)
        return await receive(self, mine, payload)

    async def counted(self: Any, run: str, number: int, attempt: int) -> list[Any]:
        return await contributions(self, run, number, attempt) + again.get((number, attempt), [])

    service.Federation._receive = received  # type: ignore[assignment,method-assign]
    sql_ledger.SqlLedger.contributions = counted  # type: ignore[method-assign]


def no_to_a_repetition() -> None:
    """Whether the round takes an update is asked before whether it has it already."""
    check = updates.check

    def checked(db: Any, offered: Any, now_us: int) -> Receipt | None:
        updates.check_open(db, updates._key(offered), now_us)
        return check(db, offered, now_us)

    updates.check = checked


def deadline_by_the_own_clock() -> None:
    """A replica reads its host's clock, and not the store's."""

    def own_clock_us(db: Any) -> int:
        return time.time_ns() // 1000

    from coordinator.stores import postgresql

    postgresql.PostgresLedger.__init__.__defaults__ = (own_clock_us, True)


def abandoned_updates_are_folded() -> None:
    """A round is made of all that was ever accepted under its number, whichever attempt that was in."""

    async def of_all_attempts(self: Any, run: str, number: int, attempt: int) -> list[Any]:
        found = [await self._read(rows.contributions, run, number, one) for one in range(1, attempt + 1)]
        return sorted(itertools.chain(*found), key=lambda one: one.device)

    sql_ledger.SqlLedger.contributions = of_all_attempts  # type: ignore[method-assign]


@dataclasses.dataclass(frozen=True)
class Bug:
    """`plant` puts it into this process. `step`: where a single crash shows it, if one does; the sweep for it is of that step
    alone, to be short. `stores`: over which it can be made."""

    plant: Callable[[], None]
    step: str | None = None
    stores: tuple[Lane, ...] = LANES


BUGS: dict[str, Bug] = {
    bug.plant.__name__: bug
    for bug in (
        Bug(row_before_blob, "file write"),
        Bug(receipt_before_commit, "COMMIT"),
        Bug(publish_in_two_transactions, "COMMIT done"),
        Bug(blob_in_its_place_before_it_is_whole, "file write done", ("sqlite",)),
        Bug(release_before_its_adapter, "file write"),
        Bug(publish_without_looking),
        Bug(accept_after_the_seal),
        Bug(
            offset_from_memory, stores=("postgresql",)
        ),  # over files an upload grows in place, and writes again what it had
        Bug(fold_counts_a_repetition),
        Bug(no_to_a_repetition),
        Bug(abandoned_updates_are_folded),
        Bug(deadline_by_the_own_clock, stores=("postgresql",)),
    )
}
