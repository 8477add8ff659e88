"""Counts the bytes of every call, both ways, and the uploads under way, whatever the call is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

import grpc

from coordinator.meter import Meter

T = TypeVar("T")
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
    """An interceptor that changes nothing and counts everything: bytes where gRPC has them, since a message would have to be
    written again to tell its size."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(details)
        if handler is None or not details.method.startswith(OURS):
            return handler
        make, name = _SHAPES[handler.request_streaming, handler.response_streaming]
        behaviour = self._upload(getattr(handler, name)) if handler.request_streaming else getattr(handler, name)
        return make(behaviour, self._received(handler.request_deserializer), self._sent(handler.response_serializer))

    def _upload(self, inner: Any) -> Any:
        async def counted(requests: AsyncIterator[Any], context: Any) -> Any:
            self._meter.uploads += 1
            try:
                return await inner(requests, context)
            finally:
                self._meter.uploads -= 1

        return counted

    def _received(self, read: Callable[[bytes], T]) -> Callable[[bytes], T]:
        def counted(data: bytes) -> T:
            self._meter.bytes_in += len(data)
            return read(data)

        return counted

    def _sent(self, write: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
        def counted(message: Any) -> bytes:
            data = write(message)
            self._meter.bytes_out += len(data)
            return data

        return counted
