"""Power cuts at any moment: what was acknowledged is there afterwards, and whoever starts again goes on."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coordinator.stores import files
from edge_client import state
from edge_client.state import DeviceState, Pending
from tests.faults import crashes
from tests.faults.disks import Disk
from tests.faults.power import MISTAKES, cuts, recorded_path, seams
from tests.faults.world import Replacement, replaced
from wire.messages import Contribution, Metrics

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="which file a handle is, only Linux says")


class Worst(random.Random):
    """All that may be lost is lost."""

    def random(self) -> float:
        return 0.99

    def choice(self, among: Any) -> Any:
        return among[0]


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as made:
        yield Path(made)


def test_no_power_cut_loses_a_receipt_or_leaves_a_store_that_nobody_can_go_on_from() -> None:
    assert [fault for found in cuts(50) for fault in found] == []


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_power_cuts_find_each_seeded_bug(mistake: str) -> None:
    assert any(cuts(60, mistake))


def test_a_blob_outlives_a_power_cut_though_another_process_made_its_folder_and_died(folder: Path) -> None:
    disk, data = Disk(folder), b"blob"

    class Died(Exception):
        pass

    def dies(path: Path) -> None:
        raise Died

    with replaced(seams(disk)):
        first, second = files.FileBlobs(folder / "blobs"), files.FileBlobs(folder / "blobs")
        with replaced([(files, "sync_folder", dies)]), pytest.raises(Died):
            first.put(data)
        digest = second.put(data)
    (folder / "left").mkdir()
    disk.left(len(disk.events), Worst(), folder / "left")
    assert bytes(files.FileBlobs(folder / "left" / "blobs").get(digest)) == data


def update(number: int) -> Pending:
    metrics = Metrics(loss_before=1.0, held_out_tokens=1)
    mine = Contribution("d1", "run", number, 1, f"{number}" * 64, 4, 1, "b" * 64, "c" * 64, metrics)
    return Pending(mine, bytes([number] * 4), {"residual": np.full(3, number, np.float32)}, number - 1)


def lost_by_a_device(folder: Path, wrong: list[Replacement]) -> list[str]:
    """A device writes an update down, hears that it counts, and writes the next one down: what no power cut may undo."""
    disk = Disk(folder)
    with replaced(seams(disk) + wrong):
        device = DeviceState(recorded_path(disk)(folder) / "device", "d1")
        device.prepare(update(1), crashes.RUN)
        written = len(disk.events)
        device.confirm(update(1), crashes.RUN)
        confirmed = len(disk.events)
        device.prepare(update(2), crashes.RUN)
        device.close()
    lost = []
    for moment in range(written, len(disk.events) + 1):
        for chance in [Worst(), *[random.Random(seed) for seed in range(8)]]:
            with tempfile.TemporaryDirectory(dir=folder) as left:
                disk.left(moment, chance, Path(left))
                found = DeviceState(Path(left) / "device")
                pending, kept = found.pending(crashes.RUN), found.codec_state(crashes.RUN, 1)
                found.close()
            counted = kept is not None and kept["residual"][0] == 1
            if not counted and (pending is None or moment >= confirmed):
                lost.append(f"after {moment}: the first update and what was not sent of it")
            if moment == len(disk.events) and (pending is None or pending.payload != update(2).payload):
                lost.append("the second update")
    return lost


def test_a_device_that_loses_power_has_the_update_that_it_may_have_sent_or_its_codec_state(folder: Path) -> None:
    assert lost_by_a_device(folder, []) == []


@pytest.mark.parametrize("call", ["sync_folder", "make_folder"])
def test_a_device_that_does_not_sync_its_folders_is_caught(call: str, folder: Path) -> None:
    without = {"sync_folder": lambda path: None, "make_folder": lambda path: path.mkdir(parents=True, exist_ok=True)}
    assert lost_by_a_device(folder, [(state, call, without[call])])
