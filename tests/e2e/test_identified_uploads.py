"""Updates of devices with identities: a large one over a link that is cut, devices revoked in the middle, and buffers."""

from __future__ import annotations

import asyncio
import dataclasses
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from coordinator.stores import Place
from coordinator.verify import verify
from edge_client.identity import Identity
from edge_client.transport import Connection
from tests.coordinator.test_identities import created_run, enrolled, reason_of
from tests.e2e.test_identities import enroll, join
from tests.e2e.test_round_machine import BUFFERED
from tests.large_update import LAYOUT, RUN
from tests.links import Link
from tests.processes import CoordinatorProcess, administrator, edgetune, finished, identified
from tests.updates import LAYOUT as SMALL
from tests.updates import update
from wire.delta import Layout
from wire.errors import Reason, Refused
from wire.identity import read_card
from wire.messages import PART_BYTES, Contribution, Task
from wire.run_spec import RunSpec


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[CoordinatorProcess]:
    with identified(tmp_path / "store") as process:
        yield process


def given(device: Connection, run: RunSpec, name: str, layout: Layout = LAYOUT) -> tuple[Contribution, bytes]:
    """A device's task, done."""
    task = device.check_in(name, (run.name,), 5.0)
    assert isinstance(task, Task)
    contribution, payload = update(run, task, layout)
    return dataclasses.replace(contribution, device=name), payload


def large_run(coordinator: CoordinatorProcess) -> None:
    with administrator(coordinator) as admin:
        admin.create_run(RUN, LAYOUT, np.zeros(LAYOUT.size, np.float32))


def test_a_large_update_over_tls_is_cut_in_the_middle_and_goes_on_where_it_was(
    coordinator: CoordinatorProcess, tmp_path: Path
) -> None:
    large_run(coordinator)
    identity, link = enrolled(coordinator, tmp_path, "d1"), Link(coordinator.address)
    offsets = list[int]()
    with Connection(link.address, identity=identity) as device:
        contribution, payload = given(device, RUN, "d1")
        size = len(payload)
        link.cut_at(size // 2)

        def mend_once_cut() -> None:
            assert link.was_cut.wait(30)
            link.mend()

        mended = threading.Thread(target=mend_once_cut)
        mended.start()
        receipt = device.send(contribution, payload, lambda done, _: offsets.append(done))
        mended.join()
        assert device.send(contribution, payload) == receipt  # told again, it is the same one
    link.close()
    assert receipt.digest == contribution.digest and size >= 4 * LAYOUT.size
    assert offsets == sorted(offsets) and offsets[-1] == size  # what was durable was never sent from the start again
    assert size // 2 < link.bytes_up < size + 4 * PART_BYTES  # TLS, and the parts that the cut destroyed


def test_a_device_that_is_revoked_in_the_middle_of_its_upload_gets_no_further(
    coordinator: CoordinatorProcess, tmp_path: Path
) -> None:
    large_run(coordinator)
    identity = enrolled(coordinator, tmp_path, "d1")
    reached = list[int]()
    with Connection(coordinator.address, identity=identity) as device, administrator(coordinator) as admin:
        contribution, payload = given(device, RUN, "d1")

        def revoke_half_way(done: int, size: int) -> None:
            if done >= size // 2 and not reached:
                admin.revoke("d1")
                reached.append(done)

        with pytest.raises(Refused) as caught:
            device.send(contribution, payload, revoke_half_way)
        assert caught.value.reason is Reason.REVOKED and reached
        status = admin.status(RUN.name)
    assert (status.offered, status.accepted, status.state) == (0, 0, "running")


def test_what_a_device_gave_does_not_count_if_it_is_revoked_before_the_seal(
    coordinator: CoordinatorProcess, tmp_path: Path
) -> None:
    """And the release that others make is recomputed without it."""
    names = ("good", "bad", "late")
    identities = {name: enrolled(coordinator, tmp_path / name, name) for name in names}
    with administrator(coordinator) as admin, ExitStack() as open_:
        run = created_run(admin, "cleaned", cohort={"goal": 2})
        held = {
            name: open_.enter_context(Connection(coordinator.address, identity=one)) for name, one in identities.items()
        }
        for name in ("good", "bad"):  # both hold a task; bad gives, and goes
            done = given(held[name], run, name, SMALL)
            if name == "bad":
                held[name].send(*done)
            else:
                kept = done
        assert admin.status("cleaned").accepted == 1
        admin.revoke("bad")
        assert reason_of(lambda: held["bad"].check_in("bad", ("cleaned",), 0.0)) is Reason.REVOKED
        held["good"].send(*kept)
        held["late"].send(*given(held["late"], run, "late", SMALL))
        release = next(s for s in admin.watch("cleaned") if len(s.releases) > 1).releases[1]
    assert release.contributions == 2
    assert devices_of(coordinator, "cleaned") == {"good", "late"}


def devices_of(coordinator: CoordinatorProcess, run: str) -> set[str]:
    """The devices of the first release, which is recomputed and whose signature is checked."""
    card = read_card(coordinator.identity / "admin")
    assert card is not None

    async def look() -> set[str]:
        store = Place.of(str(coordinator.store), None).open(create=False)
        try:
            verdicts = await verify(store, run, card.release_key)
            assert [(v.fault, v.signed) for v in verdicts] == [(None, True)] * len(verdicts)
            return {one.device for one in (await store.ledger.contributions(run, 1, 1))}
        finally:
            await store.ledger.close()

    return asyncio.run(look())


def test_devices_with_identities_fill_buffers_and_a_revoked_one_is_not_waited_for(
    coordinator: CoordinatorProcess, tmp_path: Path
) -> None:
    spec = {"name": "toy", "rounds": 4, "codec": "int8", "goal": 2, "minimum": 1, "deadline_s": 20.0}
    path = tmp_path / "spec.toml"
    path.write_text(BUFFERED.format(**spec, local_steps=4, learning_rate=0.05))
    made = edgetune("run", "create", path, *coordinator.admin)
    assert made.returncode == 0, made.stderr
    names = ("one", "two", "three")
    for name in names:
        enroll(coordinator, tmp_path, name)
    bad = Identity.read(tmp_path / "three" / "identity")
    with Connection(coordinator.address, identity=bad) as held, administrator(coordinator) as admin:
        assert isinstance(held.check_in("three", ("toy",), 5.0), Task)
        admin.revoke("three")
        began = time.monotonic()
        finished([join(coordinator, tmp_path, name) for name in ("one", "two")])
        status = admin.status("toy")
    assert time.monotonic() - began < 60
    assert status.state == "done" and len(status.releases) == 5
    assert edgetune("run", "verify", "toy", "--store", coordinator.store).returncode == 0
