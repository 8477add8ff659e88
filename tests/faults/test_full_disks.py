"""Disks that are really full, where the system lets somebody without root mount one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ALONE = ("unshare", "--user", "--map-root-user", "--mount")


def may_mount() -> bool:
    line = [*ALONE, "mount", "-t", "tmpfs", "edgetune", "/mnt"]  # nobody else sees it, and it ends with the process
    return shutil.which(ALONE[0]) is not None and subprocess.run(line, capture_output=True, timeout=20).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="this system lets nobody without root mount a file system")
def test_however_little_room_a_disk_has_that_is_said_by_name_and_no_receipt_is_lost(tmp_path: Path) -> None:
    line = [*ALONE, sys.executable, "-m", "tests.faults.full_disks", str(tmp_path)]
    result = subprocess.run(line, capture_output=True, text=True, timeout=150, check=False)
    assert result.returncode == 0, result.stderr
    attempts = [json.loads(line) for line in result.stdout.splitlines()]
    assert [attempt for attempt in attempts if attempt["faults"]] == []
    assert {attempt["ended"] for attempt in attempts[:-1]} == {"DISK_FULL"} and attempts[-1]["ended"] == "done"
    assert any(attempt["receipts"] for attempt in attempts[:-1])
