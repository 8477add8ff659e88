"""What every call passes before its handler: who calls, may they, do they speak for themselves, and are they still welcome."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc
from grpc_status import rpc_status

from coordinator.addresses import Addresses, of_peer
from coordinator.callers import presented
from coordinator.calls import reshaped
from coordinator.guards import Shares
from coordinator.identities import Identities
from coordinator.permissions import check_method, check_names
from coordinator.refusals import Refusals, status_of
from wire.certificates import Certificate
from wire.errors import EdgetuneError, Reason, Refused

RECHECK_S = 2.0
"""How often the caller of an open call is looked up again."""
MOST_OPEN = 8
"""Calls that a device may have open at one process. It needs two at a time: whoever opens more is in the way of others."""


class Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """Wraps every handler. Without a row in `MAY_CALL` a method is refused, whatever it does."""

    def __init__(self, identities: Identities, refusals: Refusals) -> None:
        self._identities, self._refusals, self._addresses = identities, refusals, Addresses()
        self._open = Shares(MOST_OPEN)

    async def intercept_service(self, continuation: Callable[..., Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        return None if handler is None else self._guarded(details.method, handler)

    def _guarded(self, method: str, handler: Any) -> Any:
        def around(behaviour: Callable[..., Any]) -> Callable[..., Any]:
            wrap = self._generator if inspect.isasyncgenfunction(behaviour) else self._coroutine
            return wrap(method, behaviour)

        return reshaped(handler, around)

    def _coroutine(self, method: str, behaviour: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def guarded(request: Any, context: grpc.aio.ServicerContext) -> Any:
            async with self._admitted(method, request, context) as own:
                return await behaviour(own, context)

        return guarded

    def _generator(
        self, method: str, behaviour: Callable[..., AsyncIterator[Any]]
    ) -> Callable[..., AsyncIterator[Any]]:
        async def guarded(request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async with self._admitted(method, request, context) as own:
                async for answer in behaviour(own, context):
                    yield answer

        return guarded

    @contextlib.asynccontextmanager
    async def _admitted(self, method: str, request: Any, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
        """The request, once its sender may make it; the call ends when that is over. Refusals leave as their status."""
        try:
            caller = presented(context)
            check_method(method, caller)
            if caller is None:
                yield request
                return
            await self._identities.check(caller)
            await self._look_where_from(caller, context)
            with self._one_more_of(caller):
                async with self._while_welcome(caller, context):
                    yield _checked(request, caller)
        except EdgetuneError as error:
            await self._refusals.end(context, error, method, request)

    def _one_more_of(self, caller: Certificate) -> contextlib.AbstractContextManager[None]:
        """While a call of a device is open. Raises Refused (BUSY) where it has enough of them."""
        if caller.role != "device":
            return contextlib.nullcontext()
        enough = f"{caller.name} has {MOST_OPEN} calls open already; come again"
        return self._open.one_of(caller.name, Refused(Reason.BUSY, enough))

    async def _look_where_from(self, caller: Certificate, context: grpc.aio.ServicerContext) -> None:
        """One certificate in two places at once is that of two: somebody should look."""
        address = of_peer(context.peer())
        if caller.role == "device" and self._addresses.are_two(caller.key, address, time.monotonic()):
            await self._identities.flag(caller, "two_addresses")

    @contextlib.asynccontextmanager
    async def _while_welcome(self, caller: Certificate, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        """Cancels the call that is open in this block when its caller is revoked or its certificate ends."""
        call, refusals = asyncio.current_task(), list[EdgetuneError]()
        assert call is not None, "a handler runs in a task"

        async def look() -> None:
            while not refusals:
                await asyncio.sleep(RECHECK_S)
                try:
                    await self._identities.check(caller)
                except EdgetuneError as refused:  # a ledger that cannot be asked is a no, too
                    refusals.append(refused)
                    call.cancel()
                    await _refuse_unheard(call, context, refused)

        looking = asyncio.create_task(look())
        try:
            yield
        except asyncio.CancelledError:
            if not refusals:
                raise
            call.uncancel()
            raise refusals[0] from None
        finally:
            if not refusals:
                looking.cancel()


async def _refuse_unheard(call: asyncio.Task[Any], context: grpc.aio.ServicerContext, refused: EdgetuneError) -> None:
    """A call that was cancelled while gRPC wrote for it ends without a status: its caller would wait for the deadline."""
    await asyncio.wait([call], timeout=RECHECK_S)
    with contextlib.suppress(Exception):  # abort always raises, and does nothing where the status is out
        await context.abort_with_status(rpc_status.to_status(status_of(refused)))


def _checked(request: Any, caller: Certificate) -> Any:
    """A request that names no other device; of a stream, message by message."""
    if hasattr(request, "DESCRIPTOR"):
        check_names(request, caller)
        return request
    return _each_checked(request, caller)


async def _each_checked(requests: AsyncIterator[Any], caller: Certificate) -> AsyncIterator[Any]:
    async for message in requests:
        check_names(message, caller)
        yield message
