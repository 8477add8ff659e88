"""What `run verify` takes for the same release, and what it says of it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator import publish, rules
from coordinator.rules import Rules
from coordinator.stores import Store
from coordinator.stores.memory import MemoryBlobs
from coordinator.stores.sqlite import SqliteLedger
from coordinator.verify import Checked, verify
from tests import factors
from tests.conformance import test_stores as stores
from wire import spec
from wire.delta import Delta, Vector
from wire.errors import SpecError
from wire.run_spec import RunSpec

LAYOUT = factors.layout()
START = factors.adapter(LAYOUT)
Change = Callable[[Vector], Vector]
CODED = {"downlink": {"codec": "int4"}}


def checked(run: RunSpec, folder: Path, change: Change, field: str = "adapter") -> Checked:
    """The verdict on release 1, of two updates, whose vector `field` was `change`d before it was published."""

    async def play() -> Checked:
        store = Store(SqliteLedger(folder), MemoryBlobs())
        by = Rules.of(run, LAYOUT)
        first = publish.initial(run, LAYOUT, store.blobs.put(publish.as_bytes(START)))
        await store.ledger.create_run(run, LAYOUT, first)
        accepted = []
        for number, device in enumerate(("a", "b")):
            assert by.codec is not None
            delta = Delta(LAYOUT, factors.update(LAYOUT, number).vector)
            payload, _ = by.codec.encode(delta, by.codec.init(LAYOUT))
            task = await stores.task_of(store.ledger, device)
            accepted.append(stores.contribution(task, device, store.blobs.put(payload), size=len(payload)))
            await store.ledger.accept(accepted[-1])
        [(_, sealed)] = await store.ledger.sealed()
        made = publish.combine(by, first, accepted, store.blobs)
        blobs = {spec.bytes_digest(blob): blob for blob in made.blobs}
        changed = change(publish.vector(memoryview(blobs[getattr(made.release, field)]), LAYOUT.size))
        digest = store.blobs.put(publish.as_bytes(changed))
        for blob in made.blobs:
            store.blobs.put(blob)
        release = dataclasses.replace(made.release, **{field: digest})  # type: ignore[arg-type]  # by name
        assert await store.ledger.publish(run.name, sealed, release)
        found = (await verify(store, run.name))[1]
        await store.ledger.close()
        return found

    return asyncio.run(play())


def run_of(aggregator: str, **changes: Any) -> RunSpec:
    return stores.spec(cohort={"goal": 2}, aggregator={"id": aggregator}, **changes)


def same(vector: Vector) -> Vector:
    return vector


def last_bits(vector: Vector) -> Vector:
    return np.nextafter(vector, np.float32(np.inf))


def one_tensor(vector: Vector) -> Vector:
    changed = vector.copy()
    changed[-3:] *= np.float32(1.001)
    return changed


@pytest.mark.parametrize(
    ("aggregator", "changes", "field"),
    [("flexlora", {}, "adapter"), ("hetlora", CODED, "residual")],
)
def test_what_another_machine_adds_up_is_taken_to_a_tolerance_and_said_so(
    aggregator: str, changes: Any, field: str, tmp_path: Path
) -> None:
    run = run_of(aggregator, **changes)
    found = [checked(run, tmp_path / str(n), change, field) for n, change in enumerate((same, last_bits, one_tensor))]
    assert [one.same_bits for one in found[:2]] == [True, False] and not any(one.fault for one in found[:2])
    assert "agrees to 1e-05, not bit for bit" in found[1].sentence and "not bit for bit" not in found[0].sentence
    assert found[2].fault == f"computed again, it differs in {field}"


def test_a_sum_of_integers_has_its_very_bits(tmp_path: Path) -> None:
    assert checked(run_of("mean"), tmp_path, last_bits).fault == "computed again, it differs in adapter"


def test_an_adapter_that_does_not_follow_from_its_coded_delta_is_refused(tmp_path: Path) -> None:
    assert checked(run_of("flexlora", **CODED), tmp_path, last_bits).fault is not None


def test_a_verdict_says_how_exact_the_aggregate_is(tmp_path: Path) -> None:
    by_mean = checked(run_of("mean"), tmp_path / "mean", same)
    fair = checked(run_of("lora_fair"), tmp_path / "fair", same)
    assert by_mean.aggregation_error is not None and fair.aggregation_error is not None
    assert 0 < fair.aggregation_error < 0.9 * by_mean.aggregation_error
    assert f"aggregation error {by_mean.aggregation_error:.1e}" in by_mean.sentence
    assert dataclasses.replace(by_mean, aggregation_error=None).sentence == "ok"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cohort": {"mode": "async", "buffer": 2, "max_staleness": 1}}, "a buffer's updates start from several"),
        ({"codec": None, "directions": {"drawn": "device", "count": 4}}, "takes deltas"),
        ({"server_optimizer": {"id": "momentum"}}, "makes the whole step itself"),
        ({"server_optimizer": {"id": "average", "learning_rate": 0.5}}, "makes the whole step itself"),
        ({"cohort": {"goal": 32768}}, "holds every update of a round"),
        ({"aggregator": {"id": "flora"}}, "history = RANK"),
        ({"aggregator": {"id": "fedex"}, "portions": {"id": "tuned", "least_rank": 1}}, "devices of one rank"),
        ({"aggregator": {"id": "flora"}, "portions": {"id": "alternate"}}, "A alone learns nothing"),
    ],
)
def test_an_aggregator_of_factors_is_refused_where_it_cannot_work(
    changes: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rules, "MOST_HELD", 1 << 20)
    table: dict[str, Any] = {"cohort": {"goal": 2}, "aggregator": {"id": "flexlora"}} | changes
    with pytest.raises(SpecError, match=said):
        Rules.of(stores.spec(**table), factors.layout(history=4) if "portions" in changes else LAYOUT)


def test_an_aggregator_of_factors_is_refused_without_factors() -> None:
    with pytest.raises(SpecError, match="no module with both A and B"):
        Rules.of(run_of("flexlora"), stores.LAYOUT)
