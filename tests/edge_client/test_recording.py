"""Recorded deltas: whole or not there, and never in the way of an update."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from edge_client import recording
from edgetune import cli
from quantize.tensors import SafeTensors
from tests.processes import write_texts
from wire.delta import Delta, Layout, Tensor
from wire.errors import MachineError, UserError
from wire.messages import Task

DELTA = Delta(Layout((Tensor("q", (100, 100)),)), np.arange(10_000, dtype=np.float32))
TASK = Task("speeches", 3, 1, "train", 2, "a" * 64, "b" * 64, DELTA.layout.digest, 0.0)


@contextmanager
def files_end_at(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes, as on a disk without room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_recorded_file_says_whose_it_is(tmp_path: Path) -> None:
    file = SafeTensors(recording.write(tmp_path, DELTA, TASK, "ann"))
    told = {"run": "speeches", "round": "3", "device": "ann", "base": "a" * 64, "spec": "b" * 64}
    assert told.items() <= file.metadata.items()
    np.testing.assert_array_equal(file.read("q").reshape(-1), DELTA.vector)


def test_a_disk_without_room_leaves_what_was_there_and_nothing_half(tmp_path: Path) -> None:
    before = recording.write(tmp_path, DELTA, TASK, "ann").read_bytes()
    for device in ("ann", "bob"):
        with files_end_at(20_000), pytest.raises(MachineError, match=f"{device}.safetensors: cannot be written"):
            recording.write(tmp_path, DELTA, TASK, device)
    (kept,) = tmp_path.iterdir()
    assert kept.read_bytes() == before


def test_a_folder_that_is_missing_is_made_and_left_empty(tmp_path: Path) -> None:
    recording.prepare(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_that_cannot_be_written_into_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "within", Path("/proc")):
        with pytest.raises(UserError, match=rf"--record-deltas {folder}: cannot be written into"):
            recording.prepare(folder)
    with files_end_at(0), pytest.raises(UserError, match="cannot be written into"):
        recording.prepare(tmp_path / "full")


def test_join_refuses_such_a_folder_before_it_looks_for_a_coordinator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_texts(tmp_path / "a.jsonl", "alpha")
    assert (
        cli.main(["client", "join", "--data", str(data), "--record-deltas", str(data), "--state", str(tmp_path / "s")])
        == 2
    )
    assert (
        f"--record-deltas {data}: cannot be written into" in capsys.readouterr().err and not (tmp_path / "s").exists()
    )
