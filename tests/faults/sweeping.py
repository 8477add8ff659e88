"""Sweeps and schedules as tests start them: in a process of its own, which forks."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""A folder in memory where that is possible: what is killed is a process, and the page cache outlives it."""

ABREAST = 3
LONGEST_S = 580.0
"""On a machine that has much other work: alone, a sweep or thirty schedules take less than a minute."""


def sweep(*more: str) -> list[dict[str, Any]]:
    """What each crash did."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        return _said("tests.faults.crashes", f"{folder}/one", *more, fine=(0,))


def schedules(store: str, count: int, *more: str) -> list[dict[str, Any]]:
    """What became of each schedule, seeds from 0; some at a time, as each waits more than it computes."""
    seeds = [",".join(map(str, range(at, count, ABREAST))) for at in range(ABREAST)]
    with ThreadPoolExecutor(ABREAST) as pool:
        parts = pool.map(
            lambda part: _said("tests.faults.schedules", "--store", store, "--seeds", part, *more, fine=(0, 1)), seeds
        )
        return [played for part in parts for played in part]


def _said(program: str, *arguments: str, fine: tuple[int, ...]) -> list[dict[str, Any]]:
    line = [sys.executable, "-m", program, *arguments]
    result = subprocess.run(line, capture_output=True, text=True, timeout=LONGEST_S, check=False)
    assert result.returncode in fine, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]
