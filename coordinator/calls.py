"""Counts the bytes of every call, both ways, and the uploads under way, whatever the call is."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from coordinator.meter import Meter

OURS = "/edgetune."


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
        coders = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.unary_unary:
            return grpc.unary_unary_rpc_method_handler(self._unary(handler.unary_unary), **coders)
        if handler.unary_stream:
            return grpc.unary_stream_rpc_method_handler(self._stream(handler.unary_stream), **coders)
        if handler.stream_unary:
            return grpc.stream_unary_rpc_method_handler(self._upload(handler.stream_unary), **coders)
        return handler

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
