"""The process's memory: giving back what loading a model leaves with the allocator."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Return freed memory to the system: loading and measuring leave much of it with the allocator."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
