"""kill -9 at every step of the embedded store, one at a time: nothing that has a receipt is ever lost."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.bugs import BUGS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork")


@pytest.fixture
def folder() -> Iterator[Path]:
    """In memory where that is possible: what is killed is a process, and the page cache outlives it."""
    made = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    yield made
    shutil.rmtree(made)


def sweep(folder: Path, *bug: str) -> list[dict[str, Any]]:
    line = [sys.executable, "-m", "tests.faults.crashes", str(folder / "one"), *bug]
    result = subprocess.run(line, capture_output=True, text=True, timeout=170, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_no_crash_loses_a_receipt_counts_an_update_twice_or_leaves_a_run_that_does_not_end(folder: Path) -> None:
    crashes = sweep(folder)
    assert [crash for crash in crashes if crash["faults"]] == []
    steps = {crash["step"] for crash in crashes}
    assert len(crashes) > 80 and {"COMMIT", "COMMIT done", "file write", "file link", "file link done"} < steps


@pytest.mark.parametrize("bug", sorted(BUGS))
def test_the_sweep_finds_each_seeded_bug(bug: str, folder: Path) -> None:
    assert sweep(folder, bug)[-1]["faults"]
