"""Counts the bytes of every call, both ways, and the uploads under way, whatever the call is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from coordinator.meter import Meter

OURS = "/edgetune."


def reshaped(handler: Any, around: Callable[[Any], Any]) -> Any:
    """A handler of the same shape and with the same coders, whose behaviour is `around` that of `handler`."""
    make, behaviour = _SHAPES[handler.request_streaming, handler.response_streaming]
    return make(around(getattr(handler, behaviour)), handler.request_deserializer, handler.response_serializer)


_SHAPES = {
    (False, False): (grpc.unary_unary_rpc_method_handler, "unary_unary"),
    (False, True): (grpc.unary_stream_rpc_method_handler, "unary_stream"),
    (True, False): (grpc.stream_unary_rpc_method_handler, "stream_unary"),
    (True, True): (grpc.stream_stream_rpc_method_handler, "stream_stream"),
}


class Counted(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """An interceptor that changes nothing and counts everything."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        if handler is None or not details.method.startswith(OURS):
            return handler
        return reshaped(handler, self._around(handler))

    def _around(self, handler: Any) -> Callable[..., Any]:
        if handler.request_streaming:
            return self._upload
        return self._stream if handler.response_streaming else self._unary

    def _unary(self, inner: Any) -> Any:
        async def counted(request: Any, context: Any) -> Any:
            self._meter.bytes_in += request.ByteSize()
            return self._sent(await inner(request, context))

        return counted

    def _stream(self, inner: Any) -> Any:
        async def counted(request: Any, context: Any) -> AsyncIterator[Any]:
            self._meter.bytes_in += request.ByteSize()
            async for answer in inner(request, context):
                yield self._sent(answer)

        return counted

    def _upload(self, inner: Any) -> Any:
        async def counted(requests: AsyncIterator[Any], context: Any) -> Any:
            self._meter.uploads += 1
            try:
                return self._sent(await inner(self._received(requests), context))
            finally:
                self._meter.uploads -= 1

        return counted

    async def _received(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            self._meter.bytes_in += request.ByteSize()
            yield request

    def _sent(self, answer: Any) -> Any:
        self._meter.bytes_out += answer.ByteSize()
        return answer
