"""`coordinator gc`: what no row names goes, what is named or new stays, on every pair of stores."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from coordinator import publish
from coordinator.garbage import Swept, sweep
from coordinator.stores import Place, Store
from tests.conformance.test_stores import LAYOUT, contribution, spec, task_of
from tests.processes import edgetune
from wire.errors import UserError

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
