"""Spans of what a coordinator does: to an exporter in memory, to a real receiver, and not at all."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from coordinator import telemetry
from coordinator.identities import Doors
from coordinator.serve import Serving, serve
from coordinator.stores import Place
from edge_client.transport import Connection
from tests.processes import CoordinatorProcess
from tests.updates import created, reason_of, update
from wire.errors import Reason

FEDERATION = "edgetune.v1.Federation/"


def spans_of(work: Callable[[Connection], None], folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[ReadableSpan]:
    """The spans of a coordinator in this process while `work` called it."""
    exporter = InMemorySpanExporter()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(telemetry, "_exporter", lambda: exporter)

    def call(address: str) -> None:
        with Connection(address) as connection:
            work(connection)

    async def scene() -> None:
        ready: asyncio.Future[Doors] = asyncio.get_running_loop().create_future()
        how = Serving(Doors("127.0.0.1:0"))
        serving = asyncio.create_task(serve(Place.of(str(folder), None).open(), how, ready.set_result))
        await asyncio.to_thread(call, (await ready).devices)
        await asyncio.sleep(1.5)  # the round is combined
        serving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await serving

    asyncio.run(scene())
    return list(exporter.get_finished_spans())


def test_calls_transactions_and_combining_are_spans_and_transactions_lie_in_their_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(connection: Connection) -> None:
        run, task = created(connection, "traced")
        connection.send(*update(run, task))
        assert reason_of(lambda: connection.status("nobody")) is Reason.UNKNOWN_RUN

    spans = spans_of(work, tmp_path, monkeypatch)
    by_name = {span.name: span for span in spans}
    assert {f"{FEDERATION}{name}" for name in ("CheckIn", "Submit", "Upload")} <= set(by_name)
    accept, submit = by_name["ledger.accept"], by_name[f"{FEDERATION}Submit"]
    assert accept.parent is not None and accept.parent.span_id == submit.context.span_id
    assert by_name["combine"].parent is None
    failed = {span.name for span in spans if span.status.status_code is StatusCode.ERROR}
    assert failed == {"edgetune.v1.Administration/GetRun", "ledger.status"}
    said = " ".join(
        f"{span.name} {dict(span.attributes or {})} {span.events} {span.status.description}" for span in spans
    )
    assert "traced" not in said and "d1" not in said and "nobody" not in said
    assert {span.resource.attributes["service.name"] for span in spans} == {telemetry.SERVICE}


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[bytes]]]:
    """A receiver of OTLP over HTTP: its address, and what it was sent."""
    received = list[bytes]()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", received
    server.shutdown()
    server.server_close()


def test_a_coordinator_sends_its_spans_where_the_standard_variable_says(
    receiver: tuple[str, list[bytes]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, received = receiver
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", address)
    with CoordinatorProcess(tmp_path / "store") as coordinator, Connection(coordinator.address) as connection:
        connection.runs()
    names = {
        span.name
        for body in received
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    }
    assert {"edgetune.v1.Administration/ListRuns", "ledger.names"} <= names


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "x"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://r"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://r"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://r", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://r", "OTEL_TRACES_EXPORTER": "none"}, False),
    ],
)
def test_spans_are_made_where_somebody_receives_them(environment: Mapping[str, str], wanted: bool) -> None:
    assert telemetry.is_wanted(environment) is wanted


def test_nothing_of_opentelemetry_is_loaded_where_nobody_wants_spans() -> None:
    program = (
        "import asyncio, sys, coordinator.serve as serve, coordinator.telemetry as telemetry\n"
        "with telemetry.tracing() as tracer: telemetry.meter(tracer)\n"
        "assert tracer is None\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
