"""Where devices wait for work. Those that ask within a moment of each other are asked for in one transaction, and where a
round wants fewer, the ledger takes them by lot: a device that is always the first gains nothing."""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from coordinator import pacing
from coordinator.stores import Ask, Ledger, Offers

GATHER_S = 0.01
"""How long the first of a group waits for others: long enough for all that a bell woke."""
REMEMBERED = 1 << 17
"""Devices sent away whose return is reckoned with."""


class Lobby:
    """One process's waiting devices: those whose calls it holds, and those it has told to come again."""

    def __init__(self, ledger: Ledger, replicas: int = 1) -> None:
        self._ledger, self._replicas = ledger, replicas
        self._asking: list[tuple[Ask, asyncio.Future[Offers]]] = []
        self._serving: asyncio.Task[None] | None = None
        self._returns: list[float] = []
        self.held = 0

    async def ask(self, ask: Ask) -> Offers:
        """As `Ledger.offer`, together with whoever else asks now."""
        answer: asyncio.Future[Offers] = asyncio.get_running_loop().create_future()
        self._asking.append((ask, answer))
        if self._serving is None:
            self._serving = asyncio.create_task(self._serve())
        return await answer

    @property
    def full(self) -> bool:
        return self.held >= pacing.HELD

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place among those whose calls are held."""
        self.held += 1
        try:
            yield
        finally:
            self.held -= 1

    def send_away(self, work_in_s: float | None) -> float:
        """In how many seconds a device that got no work should come again."""
        now = asyncio.get_running_loop().time()
        while self._returns and self._returns[0] <= now:
            heapq.heappop(self._returns)
        waiting = self.held + len(self._returns) + 1
        pause_s = pacing.retry_after_s(work_in_s, waiting, random.random(), self._replicas)  # jitter, not a secret
        if len(self._returns) < REMEMBERED:
            heapq.heappush(self._returns, now + pause_s)
        return pause_s

    async def _serve(self) -> None:
        try:
            while self._asking:
                await asyncio.sleep(GATHER_S)
                group, self._asking = self._asking, []
                await self._answer(group)
        finally:
            self._serving = None

    async def _answer(self, group: list[tuple[Ask, asyncio.Future[Offers]]]) -> None:
        outcomes: Sequence[Offers | Exception]
        try:
            outcomes = await self._ledger.offer_together([ask for ask, _ in group])
        except Exception as error:  # whatever it is, everybody who asked gets it
            outcomes = [error] * len(group)
        for (_, answer), outcome in zip(group, outcomes, strict=True):
            if answer.done():
                continue  # its caller has gone
            if isinstance(outcome, Offers):
                answer.set_result(outcome)
            else:
                answer.set_exception(outcome)
