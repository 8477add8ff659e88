"""Spans of calls, of the store's transactions and of combining, sent by OTLP where the OTEL_* variables name a receiver.

Nothing of OpenTelemetry is loaded otherwise. A span has the name of what took the time, and whether it ended well: no names
of runs or devices, no message.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import grpc

from coordinator.calls import OURS, reshaped
from coordinator.meter import Meter, Times
from wire.errors import MissingExtra

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Tracer

SERVICE = "edgetune-coordinator"
RECEIVERS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def is_wanted(environment: Mapping[str, str]) -> bool:
    """Whether the standard variables name a receiver of spans, and do not switch them off."""
    off = (
        environment.get("OTEL_SDK_DISABLED", "").lower() == "true" or environment.get("OTEL_TRACES_EXPORTER") == "none"
    )
    return not off and any(environment.get(name) for name in RECEIVERS)


@contextlib.contextmanager
def tracing() -> Iterator[Tracer | None]:
    """What makes spans, which are sent until the context ends; None where nobody wants them. Raises MissingExtra."""
    if not is_wanted(os.environ):
        yield None
        return
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = _exporter()
    except ModuleNotFoundError as error:
        raise MissingExtra("opentelemetry", "telemetry") from error
    named = {} if os.environ.get("OTEL_SERVICE_NAME") else {SERVICE_NAME: SERVICE}
    provider = TracerProvider(resource=Resource.create(named), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    try:
        yield provider.get_tracer("edgetune")
    finally:
        provider.shutdown()  # sends what is left


def _exporter() -> SpanExporter:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def meter(tracer: Tracer | None) -> Meter:
    """A meter; with a tracer, all that it times is a span, too."""
    if tracer is None:
        return Meter()
    return Meter(combining=_Traced(tracer, "combine"), ledger=_TracedByName(tracer))


class _Traced(Times):
    def __init__(self, tracer: Tracer, name: str) -> None:
        super().__init__()
        self._tracer, self._name = tracer, name

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        with _span(self._tracer, self._name), super().timed():
            yield


class _TracedByName(dict[str, Times]):
    """The times of the ledger's methods."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    def __missing__(self, name: str) -> Times:
        made = self[name] = _Traced(self._tracer, f"ledger.{name}")
        return made


@contextlib.contextmanager
def _span(tracer: Tracer, name: str) -> Iterator[None]:
    """The text of an error stays here: it may name who failed."""
    with tracer.start_as_current_span(name, record_exception=False, set_status_on_exception=False) as span:
        try:
            yield
        except BaseException:
            from opentelemetry.trace import StatusCode

            span.set_status(StatusCode.ERROR)
            raise


class TracedCalls(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc ships no types
    """An interceptor that changes nothing: each call of ours is a span, and what it asks of the ledger lies within."""

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or not details.method.startswith(OURS):
            return handler
        return reshaped(handler, lambda behaviour: self._around(details.method[1:], behaviour))

    def _around(self, name: str, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def one(request: Any, context: Any) -> Any:
            with _span(self._tracer, name):
                return await behaviour(request, context)

        async def many(request: Any, context: Any) -> AsyncIterator[Any]:
            with _span(self._tracer, name):
                async for answer in behaviour(request, context):
                    yield answer

        return many if inspect.isasyncgenfunction(behaviour) else one
