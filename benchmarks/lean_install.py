"""The onnx client's install: its size in a fresh environment, what is not in it, and how soon its command answers.

make bench-lean
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MB = 260
ABSENT = ("torch", "transformers", "peft", "bitsandbytes", "onnx")


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = Path(folder) / "bin" / "python"
        subprocess.run(
            [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{ROOT}[onnx]"], check=True
        )
        size = _megabytes(Path(folder))
        found = [name for name in ABSENT if _has(python, name)]
        seconds = _answer(python)
    print(f"install: {size:.0f} MB with pip and setuptools (at most {LIMIT_MB})")
    print(f"not in it: {', '.join(ABSENT)}" if not found else f"in it, though it should not be: {', '.join(found)}")
    print(f"`edgetune client join --help` answers in {seconds:.2f} s (at most 1)")
    return 0 if size <= LIMIT_MB and not found and seconds < 1 else 1


def _megabytes(folder: Path) -> float:
    """What the files occupy on the disk, in units of 2^20 bytes, as `du -m` counts."""
    return sum(file.lstat().st_blocks * 512 for file in folder.rglob("*")) / (1 << 20)


def _has(python: Path, name: str) -> bool:
    return subprocess.run([python, "-c", f"import {name}"], capture_output=True, check=False).returncode == 0


def _answer(python: Path) -> float:
    line = [str(python), "-m", "edgetune", "client", "join", "--help"]
    subprocess.run(line, capture_output=True, check=True)
    began = time.perf_counter()
    subprocess.run(line, capture_output=True, check=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
