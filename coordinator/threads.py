"""Work that would block the event loop, on threads of their own."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")


async def on(executor: Executor, work: Callable[..., T], *args: Any) -> T:
    """What `work` gives. A caller that is cancelled waits for it all the same: nothing that it uses, a file least of all, is
    closed while a thread still has it."""
    running = asyncio.get_running_loop().run_in_executor(executor, work, *args)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # nobody is left to hear of it
        raise
