"""Sweeps and schedules as tests start them: in a process of its own, which forks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from typing import Any

from tests import servers

ABREAST = 3
"""Crashes, and twice as many schedules, at a time: they wait as long as they compute, or longer."""
LONGEST_S = 580.0
"""On a machine that has much other work: alone, a sweep or thirty schedules take less than a minute."""


def sweep(*more: str) -> list[dict[str, Any]]:
    """What each crash did."""
    with tempfile.TemporaryDirectory(dir=servers.IN_MEMORY) as folder:
        return _said("tests.faults.crashes", f"{folder}/one", *more, abreast=ABREAST, fine=(0,))


def schedules(store: str, count: int, *more: str) -> list[dict[str, Any]]:
    """What became of each schedule, seeds from 0."""
    line = ("--store", store, "--seeds", f"0:{count}", *more)
    return _said("tests.faults.schedules", *line, abreast=2 * ABREAST, fine=(0, 1))


def _said(program: str, *arguments: str, abreast: int, fine: tuple[int, ...]) -> list[dict[str, Any]]:
    """Without a look at which lines are covered: what a fork of it runs would be forgotten with the fork."""
    line = [sys.executable, "-m", program, *arguments, "--abreast", str(abreast)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_PROCESS")}
    env |= servers.S3.environment
    result = subprocess.run(line, capture_output=True, text=True, timeout=LONGEST_S, check=False, env=env)
    assert result.returncode in fine, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]
