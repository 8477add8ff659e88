"""A coordinator that cannot combine for a while combines later; one that never can stops taking updates."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator import blame, closing, publish
from coordinator.bell import Bell
from coordinator.events import shown, unheard
from coordinator.meter import Times
from coordinator.stores import Store
from coordinator.stores.memory import MemoryBlobs
from coordinator.stores.sqlite import SqliteLedger
from tests.conformance.test_stores import LAYOUT, contribution, spec, task_of
from wire.delta import Delta
from wire.errors import MachineError, PayloadError, Reason, Refused, SpecError, StoreError


class Failing(MemoryBlobs):
    """Blobs in memory that raise what is left in `errors`, one for each blob that is put."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[Exception] = []

    def put(self, data: bytes | memoryview) -> str:
        if self.errors:
            raise self.errors.pop()
        return super().put(data)


async def sealed(store: Store, name: str = "run", **rules: Any) -> str:
    """A run whose first round waits to be combined; the digest of its one update."""
    run = spec(name=name, cohort={"goal": 1}, **{key: value for key, value in rules.items() if value is not None})
    adapter = store.blobs.put(bytes(4 * LAYOUT.size))
    await store.ledger.create_run(run, LAYOUT, publish.initial(run, LAYOUT, adapter))
    chain = run.chain()
    assert chain is not None
    vector = np.full(LAYOUT.size, 1.5, np.float32)
    payload, _ = chain.encode(Delta(LAYOUT, vector), chain.init(LAYOUT))
    digest = store.blobs.put(payload)
    await store.ledger.accept(contribution(await task_of(store.ledger, "d1"), "d1", digest, size=len(payload)))
    return digest


def play(tmp_path: Path, errors: list[Exception], until: Callable[[asyncio.Task[None], int], bool]) -> None:
    async def run() -> None:
        blobs = Failing()
        store = Store(SqliteLedger(tmp_path), blobs)
        await sealed(store)
        blobs.errors = errors
        with ThreadPoolExecutor(1) as compute:
            closer = asyncio.create_task(closing.close_rounds(store, compute, Bell(), Bell(), Bell(), Times()))
            async with asyncio.timeout(10):
                while not until(closer, (await store.ledger.release("run", None)).version):
                    await asyncio.sleep(0.02)
            closer.cancel()
            await asyncio.gather(closer, return_exceptions=True)
        await store.ledger.close()

    asyncio.run(run())


@pytest.mark.parametrize("reason", [Reason.BUSY, Reason.DISK_FULL])
def test_a_round_is_combined_when_the_store_answers_again(
    reason: Reason, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closing, "IDLE_S", 0.05)
    errors: list[Exception] = [Refused(reason, "not now")] * 3
    play(tmp_path, errors, lambda closer, version: version == 1)
    assert errors == []


TURNED = {"id": "rank_rotate"}
CLASHING = {"codec": [TURNED, TURNED, {"id": "float32"}, {"id": "pack"}]}
"""The second turn overwrites the normals of the first: a KeyError as it is decoded."""


async def closed(store: Store, *, events: Any = unheard) -> bool:
    with ThreadPoolExecutor(1) as compute:
        return await closing._close_due(store, compute, Bell(), Times(), None, events)


def test_a_mistake_of_ours_ends_its_run_alone_by_name(tmp_path: Path) -> None:
    async def run() -> None:
        store, said = Store(SqliteLedger(tmp_path), MemoryBlobs()), []
        await sealed(store, "broken", downlink=CLASHING)
        await sealed(store, "other")
        assert await closed(store, events=lambda event, **about: said.append((event, about)))
        assert not await closed(store), "a run that has failed is looked at no more"
        status = await store.ledger.status("broken")
        assert (status.state, (await store.ledger.release("broken", None)).version) == ("failed", 0)
        assert "KeyError at wire.codecs." in status.detail and "report it" in status.detail
        assert (await store.ledger.release("other", None)).version == 1
        broken = next(about for event, about in said if event == "broken")
        assert shown("broken", broken) == broken, "every field of it is said"
        assert broken["run"] == "broken" and broken["kind"] == "KeyError"
        await store.ledger.close()

    asyncio.run(run())


def test_a_mistake_that_comes_of_a_damaged_blob_is_the_stores(tmp_path: Path) -> None:
    async def run() -> None:
        blobs = MemoryBlobs()
        store = Store(SqliteLedger(tmp_path), blobs)
        digest = await sealed(store)
        blobs._kept[digest] = (b"ETU1 and what is not an update", 0.0)
        with pytest.raises(StoreError, match=f"{digest[:12]}… is damaged"):
            await closed(store)
        assert (await store.ledger.status("run")).state == "running"
        await store.ledger.close()

    asyncio.run(run())


def test_a_coded_step_that_is_finite_and_huge_has_diverged(tmp_path: Path) -> None:
    async def run() -> None:
        store = Store(SqliteLedger(tmp_path), MemoryBlobs())
        fast = {"id": "momentum", "learning_rate": 1e38, "nesterov": False}
        await sealed(store, server_optimizer=fast, downlink={"codec": "ecsq"})
        assert await closed(store)
        status = await store.ledger.status("run")
        assert status.state == "failed" and "has diverged" in status.detail
        await store.ledger.close()

    asyncio.run(run())


TROUBLES = [
    StoreError("x"),
    Refused(Reason.BUSY, "x"),
    MachineError("x"),
    OSError(5, "x"),
    MemoryError(),
    ImportError("zstd"),
]


@pytest.mark.parametrize("error", TROUBLES, ids=lambda error: type(error).__name__)
def test_no_run_is_blamed_for_the_store_or_the_machine(error: Exception) -> None:
    assert blame.mistake(error) is None


@pytest.mark.parametrize(
    "error", [KeyError("x"), ValueError("x"), SpecError("x"), PayloadError(Reason.BAD_PAYLOAD, "x")]
)
def test_what_the_program_did_wrong_is_told_by_kind_and_place_and_never_by_what_it_says(error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        raise error
    found = blame.mistake(caught.value)
    assert found is not None and found.kind == type(error).__name__
    assert found.place.startswith(f"{__name__}:") and "'x'" not in found.sentence(1)


@pytest.mark.parametrize("downlink", [None, {"codec": "float16"}, {"codec": "int4"}])
def test_a_run_that_diverges_fails_and_the_coordinator_goes_on(downlink: Any, tmp_path: Path) -> None:
    async def run() -> None:
        store = Store(SqliteLedger(tmp_path), MemoryBlobs())
        rate = {"id": "average", "learning_rate": 3.4e38}
        await sealed(store, server_optimizer=rate, downlink=downlink)
        with ThreadPoolExecutor(1) as compute:
            assert await closing._close_due(store, compute, Bell(), Times(), None)
            assert not await closing._close_due(store, compute, Bell(), Times(), None)
        status = await store.ledger.status("run")
        assert (status.state, (await store.ledger.release("run", None)).version) == ("failed", 0)
        assert "diverged" in status.detail or "too large" in status.detail
        await store.ledger.close()

    asyncio.run(run())


def test_a_store_that_is_damaged_ends_the_coordinator(tmp_path: Path) -> None:
    def ended(closer: asyncio.Task[None], version: int) -> bool:
        assert version == 0
        return closer.done() and isinstance(closer.exception(), StoreError)

    play(tmp_path, [StoreError("damaged")], ended)
