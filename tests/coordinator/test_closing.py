"""A coordinator that cannot combine for a while combines later; one that never can stops taking updates."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator import closing, publish
from coordinator.bell import Bell
from coordinator.meter import Times
from coordinator.stores import Store
from coordinator.stores.memory import MemoryBlobs
from coordinator.stores.sqlite import SqliteLedger
from tests.conformance.test_stores import LAYOUT, contribution, spec, task_of
from wire.delta import Delta
from wire.errors import Reason, Refused, StoreError


class Failing(MemoryBlobs):
    """Blobs in memory that raise what is left in `errors`, one for each blob that is put."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[Exception] = []

    def put(self, data: bytes | memoryview) -> str:
        if self.errors:
            raise self.errors.pop()
        return super().put(data)


async def sealed(store: Store, **rules: Any) -> None:
    """A run whose first round waits to be combined."""
    run = spec(cohort={"goal": 1}, **{key: value for key, value in rules.items() if value is not None})
    adapter = store.blobs.put(bytes(4 * LAYOUT.size))
    await store.ledger.create_run(run, LAYOUT, publish.initial(run, LAYOUT, adapter))
    chain = run.chain()
    assert chain is not None
    vector = np.full(LAYOUT.size, 1.5, np.float32)
    payload, _ = chain.encode(Delta(LAYOUT, vector), chain.init(LAYOUT))
    digest = store.blobs.put(payload)
    await store.ledger.accept(contribution(await task_of(store.ledger, "d1"), "d1", digest, size=len(payload)))


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
