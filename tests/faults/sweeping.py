"""A sweep of single crashes as tests start it: in a process of its own, which forks."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""A folder in memory where that is possible: what is killed is a process, and the page cache outlives it."""


def sweep(*more: str) -> list[dict[str, Any]]:
    """What each crash did."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        line = [sys.executable, "-m", "tests.faults.crashes", f"{folder}/one", *more]
        result = subprocess.run(line, capture_output=True, text=True, timeout=170, check=False)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]
