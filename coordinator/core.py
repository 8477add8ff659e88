"""What the services of a process share, and how each of their calls ends.

Every handler is `answered` or `streamed`: an error of ours leaves as its status with ErrorInfo, and nothing else leaves at all.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

import grpc

from coordinator.bell import Bell
from coordinator.events import Events, unheard
from coordinator.guards import DEFAULTS, Guards, Limits
from coordinator.identities import Identities
from coordinator.lobby import Lobby
from coordinator.meter import Meter
from coordinator.refusals import Refusals
from coordinator.rules import Rules
from coordinator.stores import Store
from coordinator.threads import on
from coordinator.uploads import Uploads
from wire.errors import EdgetuneError, Reason, Refused

T = TypeVar("T")
TRANSFERS = 8
"""Large streams served at once, each way; the rest wait in HTTP/2 flow control, so memory does not grow with them."""
POLL_S = 10.0
"""How long a held call may overlook what another process did, should the ledger's word of it be lost."""
NO_IDENTITIES = "this coordinator has no identities; `edgetune coordinator init` makes them"


class Core:
    """What the services share. Nothing here outlives a restart: the cache holds only what can never change."""

    def __init__(
        self,
        store: Store,
        compute: Executor,
        disk: Executor,
        accepted: Bell,
        changed: Bell,
        work: Bell,
        meter: Meter,
        who: Identities | None = None,
        limits: Limits = DEFAULTS,
        events: Events = unheard,
        replicas: int = 1,
    ) -> None:
        self.store, self.compute, self.disk, self.meter, self.who = store, compute, disk, meter, who
        self.events, self.refusals = events, Refusals(meter, events)
        self.accepted, self.changed, self.work = accepted, changed, work
        self.guards, self.lobby = Guards(limits, store.blobs), Lobby(store.ledger, replicas)
        self.uploads = Uploads(store, self.guards, compute, disk)
        self.streams, self.downloads = asyncio.Semaphore(TRANSFERS), asyncio.Semaphore(TRANSFERS)
        self.draining = False
        self._rules: dict[str, Rules] = {}

    @property
    def identities(self) -> Identities:
        """Raises Refused where this coordinator has none."""
        if self.who is None:
            raise Refused(Reason.NO_IDENTITIES, NO_IDENTITIES)
        return self.who

    def drain(self) -> None:
        """Let held calls answer with what there is: their callers ask again, and another process answers."""
        self.draining = True
        self.work.ring()
        self.changed.ring()

    async def rules(self, name: str) -> Rules:
        if name not in self._rules:
            run = await self.store.ledger.run(name)
            self._rules[name] = Rules.of(run.spec, run.layout)
        return self._rules[name]

    async def blob(self, digest: str) -> memoryview:
        return await on(self.disk, self.store.blobs.get, digest)


def answered(handler: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
    """A handler with one answer."""

    @functools.wraps(handler)
    async def call(self: Any, request: Any, context: grpc.aio.ServicerContext) -> T:
        try:
            return await handler(self, request, context)
        except EdgetuneError as error:
            await self._core.refusals.end(context, error, handler.__name__, request)
            raise  # unreachable: abort raises

    return call


def streamed(handler: Callable[..., AsyncIterator[T]]) -> Callable[..., AsyncIterator[T]]:
    """A handler with a stream of answers."""

    @functools.wraps(handler)
    async def call(self: Any, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[T]:
        try:
            async for answer in handler(self, request, context):
                yield answer
        except EdgetuneError as error:
            await self._core.refusals.end(context, error, handler.__name__, request)

    return call
