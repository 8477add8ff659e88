"""Seeded bugs: each is a mistake that the store could have been built with. The sweep must find every one of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from coordinator import closing, publish, service, threads
from coordinator.stores import Ledger, files, group_commit, rows, sql_ledger
from wire import spec


def row_before_blob() -> None:
    """The row that names a payload is committed before the payload is in its place."""

    async def receive(self: Any, contribution: Any, payload: bytes | None) -> Any:
        receipt = await self._store.ledger.accept(contribution)
        if payload:
            await threads.on(self._core.disk, self._store.blobs.put, payload)
        elif payload is None:
            await self._core.uploads.join(contribution)
        return receipt

    service.Federation._receive = receive  # type: ignore[method-assign]


def receipt_before_commit() -> None:
    """A job is answered when it has run, and not when that is durable."""
    attempt = group_commit.GroupCommit._attempt

    def answered(self: Any, job: Any) -> Any:
        before = self._session._db.total_changes
        outcome = attempt(self, job.work)
        group_commit._answer(job, outcome)
        if self._session._db.total_changes != before:
            time.sleep(0.02)  # the time that a sync takes
        return outcome

    def outcomes(self: Any, batch: list[Any]) -> list[Any]:
        self._session.begin()
        done = [answered(self, job) for job in batch]
        self._session.commit()
        return done

    group_commit.GroupCommit._outcomes = outcomes  # type: ignore[method-assign]


def publish_in_two_transactions() -> None:
    """A release becomes a row in one transaction, and the next round opens in another."""
    insert, opened = rows.insert_round, list[tuple[str, Any]]()
    whole = sql_ledger.SqlLedger.publish

    async def published(self: Any, run: str, sealed: Any, release: Any) -> bool:
        rows.insert_round = lambda db, name, fresh: opened.append((name, fresh))
        won = await whole(self, run, sealed, release)
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
        made = publish.combine(publish.rules(run.spec, run.layout), parent, accepted, store.blobs)
        await ledger.publish(name, sealed, made.release)
        for blob in made.blobs:
            store.blobs.put(blob)

    closing.close = close


BUGS: dict[str, tuple[Callable[[], None], str]] = {
    bug.__name__: (bug, step)
    for bug, step in (
        (row_before_blob, "file write"),
        (receipt_before_commit, "COMMIT"),
        (publish_in_two_transactions, "COMMIT done"),
        (blob_in_its_place_before_it_is_whole, "file write done"),
        (release_before_its_adapter, "file write"),
    )
}
"""Each bug, and the step at one of whose arrivals a crash shows it: the sweep for it is of that step alone, to be short."""
