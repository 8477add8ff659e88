"""`coordinator gc`: what no row names goes, what is named or new stays, on every pair of stores."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator import publish
from coordinator.bell import Bell
from coordinator.core import Core
from coordinator.garbage import Swept, sweep
from coordinator.meter import Meter
from coordinator.service import Federation
from coordinator.stores import Place, Store, deletions
from coordinator.stores.connection import Connection
from tests.conformance.test_stores import LAYOUT, contribution, refusal, spec, task_of
from tests.processes import edgetune
from wire.codecs import chain
from wire.delta import Delta
from wire.errors import Reason, UserError

HOUR_S = 3600.0


@pytest.fixture(params=["sqlite and files", "postgresql and s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "sqlite and files":
        return Place.of(str(tmp_path), None)
    postgres, s3 = (request.getfixturevalue(name) for name in ("postgres_server", "s3_server"))
    return Place.of(postgres.fresh(), s3.fresh())


async def used(store: Store) -> tuple[set[str], str]:
    """A store with a run and an update, and one blob that no row names: the named, and the other."""
    created = spec()
    adapter, update, orphan = (store.blobs.put(data) for data in (b"adapter", b"update", b"orphan"))
    await store.ledger.create_run(created, LAYOUT, publish.initial(created, LAYOUT, adapter))
    await store.ledger.accept(contribution(await task_of(store.ledger, "d1"), "d1", update))
    return {adapter, update}, orphan


def test_what_no_row_names_is_deleted_once_it_is_old_and_nothing_else(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        store = place.open()
        named, orphan = await used(store)
        assert await sweep(place.open(), HOUR_S, dry_run=False) == Swept()
        age(monkeypatch, place, HOUR_S + 60)
        store.blobs.put(b"new")
        assert await sweep(place.open(), HOUR_S, dry_run=True) == Swept(1, 6)
        assert orphan in set(store.blobs.digests())
        assert await sweep(place.open(), HOUR_S, dry_run=False) == Swept(1, 6)
        assert named < set(store.blobs.digests()) and orphan not in set(store.blobs.digests())
        assert len(list(store.blobs.digests())) == 3
        await store.ledger.close()

    asyncio.run(scene())


def test_a_blob_that_is_put_again_is_as_good_as_new(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        store = place.open()
        _, orphan = await used(store)
        age(monkeypatch, place, HOUR_S + 60)
        assert orphan in set(store.blobs.older(HOUR_S))
        store.blobs.put(b"orphan")
        assert orphan not in set(store.blobs.older(HOUR_S))
        await store.ledger.close()

    asyncio.run(scene())


def age(monkeypatch: pytest.MonkeyPatch, place: Place, seconds: float) -> None:
    """Let every blob that there is have been put `seconds` ago."""
    if place.blobs.startswith("s3://"):
        from moto.s3.models import s3_backends

        for key in s3_backends["123456789012"]["global"].buckets["bucket"].keys.values():
            key.last_modified = key.last_modified.fromtimestamp(time.time() - seconds, key.last_modified.tzinfo)
        return
    for path in Path(place.blobs).glob("??/*"):
        os.utime(path, (time.time() - seconds, time.time() - seconds))


def test_a_request_that_slept_while_its_blob_was_swept_away_has_to_put_it_again(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scene() -> None:
        store = place.open()
        await used(store)
        mine, since_us = contribution(await task_of(store.ledger, "d2"), "d2"), await store.ledger.now_us()
        late = dataclasses.replace(mine, digest=store.blobs.put(b"late"))
        age(monkeypatch, place, HOUR_S + 60)
        assert (await sweep(place.open(), HOUR_S, dry_run=False)).blobs == 2
        assert await refusal(store.ledger.accept(late, since_us)) is Reason.BUSY
        assert await refusal(created_of(store, late.digest, since_us)) is Reason.BUSY
        since_us = await store.ledger.now_us()
        store.blobs.put(b"late")
        await store.ledger.accept(late, since_us)
        assert bytes(store.blobs.get(late.digest)) == b"late"
        await store.ledger.close()

    asyncio.run(scene())


async def created_of(store: Store, adapter: str, since_us: int) -> None:
    created = spec("another")
    await store.ledger.create_run(created, LAYOUT, publish.initial(created, LAYOUT, adapter), since_us)


def test_a_blob_that_is_being_swept_away_can_neither_be_named_nor_be_swept_by_another(place: Place) -> None:
    async def scene() -> None:
        store = place.open()
        _, orphan = await used(store)
        mine = dataclasses.replace(contribution(await task_of(store.ledger, "d2"), "d2"), digest=orphan)
        for sweep_, marked in (("first", {orphan}), ("second", set()), ("first", {orphan})):
            assert await store.ledger.transact(mark(orphan, sweep_)) == marked
        assert await refusal(store.ledger.accept(mine, await store.ledger.now_us())) is Reason.BUSY
        await store.ledger.transact(lambda db, now_us: deletions.gone(db, "first", now_us - 1))
        await store.ledger.accept(mine, await store.ledger.now_us())
        assert await store.ledger.transact(mark(orphan, "third")) == set()
        await store.ledger.close()

    asyncio.run(scene())


def mark(blob: str, sweep_: str) -> Callable[[Connection, int], set[str]]:
    return lambda db, now_us: deletions.mark(db, {blob}, sweep_, now_us)


def test_a_sweep_that_died_is_forgotten_after_a_day_and_a_request_that_took_as_long_is_too_late(place: Place) -> None:
    async def scene() -> None:
        store = place.open()
        _, orphan = await used(store)
        mine = dataclasses.replace(contribution(await task_of(store.ledger, "d2"), "d2"), digest=orphan)
        now_us, day_us = await store.ledger.now_us(), deletions.KEPT_US
        await store.ledger.transact(lambda db, _: deletions.mark(db, {orphan}, "dead", now_us - day_us - 1))
        assert await store.ledger.transact(mark(orphan, "living")) == {orphan}
        await store.ledger.transact(lambda db, _: deletions.gone(db, "living", now_us - day_us))
        assert await refusal(store.ledger.accept(mine, now_us - day_us - 1)) is Reason.BUSY
        await store.ledger.close()

    asyncio.run(scene())


def test_an_update_swept_away_before_its_row_gets_no_receipt_until_it_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, put = Place.of(str(tmp_path), None), Federation._put
    codec = chain.codec("float32")
    payload, _ = codec.encode(Delta(LAYOUT, np.ones(4, np.float32)), codec.init(LAYOUT))

    def slept(self: Federation, data: bytes) -> None:
        put(self, data)
        age(monkeypatch, place, HOUR_S + 60)
        asyncio.run(sweep(place.open(), HOUR_S, dry_run=False))

    async def scene(pool: Executor) -> None:
        store = place.open()
        federation = Federation(Core(store, pool, pool, Bell(), Bell(), Bell(), Meter()))
        await used(store)
        task = await task_of(store.ledger, "d2")
        mine = contribution(task, "d2", hashlib.sha256(payload).hexdigest(), size=len(payload))
        with monkeypatch.context() as patched:
            patched.setattr(Federation, "_put", slept)
            assert await refusal(federation._receive(mine, payload)) is Reason.BUSY
        await asyncio.sleep(0.002)
        assert (await federation._receive(mine, payload)).digest == mine.digest
        assert len(store.blobs.get(mine.digest)) == len(payload)
        await store.ledger.close()

    with ThreadPoolExecutor(1) as pool:
        asyncio.run(scene(pool))


def test_a_grace_shorter_than_a_request_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--grace"):
        asyncio.run(sweep(Place.of(str(tmp_path), None).open(), 1.0, dry_run=False))


def test_the_command_says_what_it_did(tmp_path: Path) -> None:
    async def prepare() -> None:
        store = Place.of(str(tmp_path), None).open()
        await used(store)
        await store.ledger.close()

    asyncio.run(prepare())
    for path in (tmp_path / "blobs").glob("??/*"):
        os.utime(path, (0, 0))

    def told(*more: str) -> dict[str, Any]:
        result = edgetune("coordinator", "gc", "--store", tmp_path, "--json", *more)
        assert result.returncode == 0, result.stderr
        answer: dict[str, Any] = json.loads(result.stdout)
        return answer

    assert told("--dry-run") == {"deleted": False, "blobs": 1, "bytes": 6}
    assert told("--grace", "2h") == {"deleted": True, "blobs": 1, "bytes": 6}
    assert told() == {"deleted": True, "blobs": 0, "bytes": 0}
    missing = edgetune("coordinator", "gc", "--store", tmp_path / "nowhere")
    assert missing.returncode == 2 and "no coordinator's store here" in missing.stderr
