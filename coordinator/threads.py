"""Work that would block the event loop, on threads of their own, and work that is not left half done."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

T = TypeVar("T")


async def on(executor: Executor, work: Callable[..., T], *args: Any) -> T:
    """What `work` gives. A caller that is cancelled waits for it all the same: nothing that it uses, a file least of all, is
    closed while a thread still has it."""
    return await to_its_end(asyncio.get_running_loop().run_in_executor(executor, work, *args))


async def to_its_end(work: Awaitable[T]) -> T:
    """What `work` gives. A caller that is cancelled meanwhile is so only when it has ended."""
    running = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait([running])
        if not running.cancelled():
            running.exception()  # nobody is left to hear of it
        raise
