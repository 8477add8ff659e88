"""Bell: lets many coroutines of one process wait for "something changed" without polling and without missing a ring."""

from __future__ import annotations

import asyncio


class Bell:
    """Take a `ticket`, look at the state, `wait` with the ticket: a ring in between is not lost."""

    def __init__(self) -> None:
        self._rings = 0
        self._event = asyncio.Event()

    def ticket(self) -> int:
        return self._rings

    def ring(self) -> None:
        self._rings += 1
        self._event.set()
        self._event = asyncio.Event()

    async def wait(self, ticket: int, timeout_s: float) -> None:
        """Returns at once if the bell rang since `ticket` was taken, else at the next ring or after `timeout_s`."""
        if self._rings == ticket:
            event = self._event
            try:
                await asyncio.wait_for(event.wait(), timeout_s)
            except TimeoutError:
                return
