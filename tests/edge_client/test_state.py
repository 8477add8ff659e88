from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.state import DeviceState, Pending
from wire import run_spec
from wire.errors import MachineError, PayloadError, Reason, UserError
from wire.messages import Contribution, Metrics, ReleaseManifest, Task
from wire.run_spec import RunSpec

BUFFERS = {"mode": "async", "buffer": 1, "max_staleness": 2}


def run(**changes: Any) -> RunSpec:
    base = {"model": "toy", "format": "toy"}
    table = {"name": "r", "base": base, "rounds": 3, "cohort": {"goal": 1}, "method": {"id": "lora"}}
    return run_spec.parse(table | changes)


def update(number: int = 1) -> Pending:
    metrics = Metrics(5.0 - number, None, 10, bytes_up=3, bytes_down=7)
    contribution = Contribution("d", "r", number, 1, "a" * 64, 3, 2, "b" * 64, "c" * 64, metrics)
    return Pending(contribution, b"\0\1\2", {"0.residual": np.array([1, 2, number], np.float32)}, number - 1)


@pytest.fixture
def state(tmp_path: Path) -> Iterator[DeviceState]:
    opened = DeviceState(tmp_path / "state", "d")
    yield opened
    opened.close()


def reopened(state: DeviceState) -> DeviceState:
    state.close()
    return DeviceState(state.folder)


def test_the_codec_state_is_what_it_was_until_the_receipt(state: DeviceState) -> None:
    assert state.codec_state(run(), 1) is None
    state.prepare(update(), run())
    assert state.codec_state(run(), 1) is None
    state.confirm(update(), run())
    kept = state.codec_state(run(), 1)
    assert kept is not None
    assert kept["0.residual"].tolist() == [1, 2, 1]


@pytest.mark.parametrize(("cohort", "still"), [({"goal": 1}, {1}), (BUFFERS, {0, 1, 2, 3})], ids=["rounds", "buffers"])
def test_what_an_update_left_unsent_is_forgotten_by_a_device_that_missed_releases(
    state: DeviceState, cohort: dict[str, Any], still: set[int]
) -> None:
    state.prepare(update(), run(cohort=cohort))
    state.confirm(update(), run(cohort=cohort))
    assert {v for v in range(-1, 9) if state.codec_state(run(cohort=cohort), v) is not None} == still


def test_a_loss_has_fallen_from_the_first_that_was_measured_in_this_very_run(state: DeviceState) -> None:
    assert state.fallen(run(), 2.0) == 0.0
    for number in (1, 2):
        state.prepare(update(number), run())
        state.confirm(update(number), run())
    assert state.fallen(run(), 2.5) == 1.5
    assert state.fallen(run(rounds=4), 2.5) == 0.0


def test_what_an_older_client_wrote_down_is_sent_and_its_codec_state_forgotten(state: DeviceState) -> None:
    state.prepare(update(), run())
    file = state.folder / "runs" / "r" / "pending.npz"
    with np.load(file) as arrays:
        older = {name: arrays[name] for name in arrays.files if name != "version"}
    np.savez(file, **older)
    pending = state.pending(run())
    assert pending is not None and pending.payload == update().payload
    state.confirm(pending, run())
    assert all(state.codec_state(run(), version) is None for version in range(3))


def test_an_update_that_was_written_down_survives_a_restart_whole(state: DeviceState) -> None:
    state.prepare(update(), run())
    again = reopened(state)
    pending = again.pending(run())
    assert pending is not None
    assert (pending.contribution, pending.payload, pending.version) == (update().contribution, update().payload, 0)
    assert pending.codec_state["0.residual"].tolist() == [1, 2, 1]
    again.close()


def test_confirming_twice_counts_once(state: DeviceState) -> None:
    for number in (1, 1, 2):
        state.prepare(update(number), run())
        state.confirm(update(number), run())
    record = state.record("r")
    assert (record.rounds, record.bytes_up, record.bytes_down) == (2, 6, 14)
    assert (record.loss_first, record.loss_last) == (4.0, 3.0)


def test_what_is_the_devices_own_follows_the_receipt_and_outlives_the_process(state: DeviceState) -> None:
    first, after = np.zeros(2, np.float32), np.array([3, 4], np.float32)
    pending = dataclasses.replace(update(), own=after)
    state.prepare(pending, run())
    assert state.own(run(), first) is first
    again = reopened(state)
    found = again.pending(run())
    assert found is not None
    again.confirm(found, run())
    third = reopened(again)
    assert np.array_equal(third.own(run(), first), after)
    assert third.own(run(seed=1), first) is first, "another run of the same name"
    third.close()


def test_a_discarded_update_leaves_the_codec_state_of_the_one_before(state: DeviceState) -> None:
    state.prepare(update(1), run())
    state.confirm(update(1), run())
    state.prepare(update(2), run())
    state.discard("r")
    assert state.pending(run()) is None
    kept = state.codec_state(run(), 1)
    assert kept is not None
    assert kept["0.residual"].tolist() == [1, 2, 1]


def test_another_run_of_the_same_name_finds_nothing_of_the_old_one(state: DeviceState) -> None:
    state.prepare(update(), run())
    state.confirm(update(), run())
    state.prepare(update(2), run())
    assert state.codec_state(run(seed=1), 1) is None
    assert state.pending(run(seed=1)) is None


def test_a_release_is_kept_over_a_restart_and_a_damaged_one_is_as_good_as_none(state: DeviceState) -> None:
    release, adapter = ReleaseManifest("r", 7, "a" * 64, "b" * 64, None, None, None, ()), np.arange(5, dtype=np.float32)
    assert state.kept("r") is None
    state.keep(release, adapter)
    again = reopened(state)
    kept = again.kept("r")
    assert kept is not None and kept[0] == release and kept[1].tobytes() == adapter.tobytes()
    file = state.folder / "runs" / "r" / "release.npz"
    for damaged in (file.read_bytes()[:-40], b"", b"not an archive"):
        file.write_bytes(damaged)
        assert again.kept("r") is None
    again.close()


def test_a_task_left_behind_is_found(state: DeviceState) -> None:
    task = Task("r", 1, 1, "train", 0, "a" * 64, "b" * 64, "c" * 64, 60.0)
    state.begin(task)
    again = reopened(state)
    assert again.task() == task
    again.end()
    assert again.task() is None
    again.close()


def test_the_name_is_kept_and_another_is_refused(state: DeviceState) -> None:
    again = reopened(state)
    assert again.device == "d"
    again.close()
    with pytest.raises(UserError):
        DeviceState(state.folder, "other")


def test_one_folder_is_one_clients(state: DeviceState) -> None:
    with pytest.raises(UserError):
        DeviceState(state.folder)


def test_forgetting_a_run_forgets_all_of_it(state: DeviceState) -> None:
    state.prepare(update(), run())
    state.confirm(update(), run())
    state.forget("r")
    assert state.runs() == []
    assert state.codec_state(run(), 1) is None


def test_a_run_only_goes_forward_whatever_the_coordinator_says(state: DeviceState) -> None:
    def release(version: int, name: str = "r") -> ReleaseManifest:
        return ReleaseManifest(name, version, "a" * 64, "b" * 64, None, None, None, ())

    for version in (0, 1, 3, 3):
        state.saw(release(version))
    again = reopened(state)
    with pytest.raises(PayloadError, match="goes back") as caught:
        again.saw(release(2))
    assert caught.value.reason is Reason.ROLLED_BACK
    again.saw(release(0, "another"))
    again.forget("r")
    again.saw(release(0))
    again.close()


def test_a_folder_that_cannot_be_written_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError):
        DeviceState(tmp_path / "file" / "state")


def test_nothing_written_down_needs_pickle(state: DeviceState) -> None:
    state.prepare(dataclasses.replace(update()), run())
    for path in state.folder.rglob("*.npz"):
        with np.load(path, allow_pickle=False) as arrays:
            assert all(arrays[name].dtype != object for name in arrays)
