"""`--metrics HOST:PORT`: one process's meter and the store's rounds, in the text format of Prometheus.

Labels are names of this program alone (states, reasons, methods): nobody who calls can make the answer grow.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from coordinator.meter import BOUNDS_S, Meter, Times
from coordinator.stores import Ledger
from wire import addresses
from wire.errors import EdgetuneError, MachineError

ANSWER_S = 5.0
"""How long a scrape waits for the ledger; without its answer it goes without the rounds."""


@contextmanager
def shown(meter: Meter, ledger: Ledger, address: str) -> Iterator[None]:
    """Serve the numbers at `address` for as long as the context lasts, from a thread beside the running loop.

    Raises MachineError if the address is taken or not this machine's.
    """
    host, port = addresses.parse(address)
    registry = CollectorRegistry()
    registry.register(_Numbers(meter, ledger, asyncio.get_running_loop()))
    try:
        server, thread = start_http_server(port, host, registry)
    except OSError as error:
        raise MachineError(
            f"cannot show metrics on {address}: the port is in use or the address is not this machine's"
        ) from error
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Numbers(Collector):
    def __init__(self, meter: Meter, ledger: Ledger, loop: asyncio.AbstractEventLoop) -> None:
        self._meter, self._ledger, self._loop = meter, ledger, loop

    def describe(self) -> list[Metric]:
        return []  # else the registry would collect while the loop waits for it

    def collect(self) -> Iterator[Metric]:
        meter = self._meter
        yield _gauges("rounds", "Rounds of all runs in the store, by state", "state", self._rounds())
        yield CounterMetricFamily("edgetune_accepts", "Updates taken into a round", value=meter.accepts)
        refusals = CounterMetricFamily("edgetune_refusals", "Calls refused, by reason", labels=["reason"])
        for reason, count in list(meter.refusals.items()):
            refusals.add_metric([reason.value], count)
        yield refusals
        alarms = CounterMetricFamily("edgetune_alarms", "Devices that somebody should look at", labels=["alarm"])
        for alarm, count in list(meter.alarms.items()):
            alarms.add_metric([alarm], count)
        yield alarms
        yield CounterMetricFamily("edgetune_received_bytes", "Message bytes received", value=meter.bytes_in)
        yield CounterMetricFamily("edgetune_sent_bytes", "Message bytes sent", value=meter.bytes_out)
        yield GaugeMetricFamily("edgetune_uploads", "Uploads under way", value=meter.uploads)
        yield _histogram("combine_seconds", "Seconds from a sealed round to its release", {(): meter.combining})
        by_method: dict[tuple[str, ...], Times] = {(name,): times for name, times in list(meter.ledger.items())}
        yield _histogram("ledger_seconds", "Seconds a transaction took, by method", by_method, "method")

    def _rounds(self) -> dict[str, int]:
        asked = asyncio.run_coroutine_threadsafe(self._ledger.rounds_by_state(), self._loop)
        try:
            return asked.result(ANSWER_S)
        except (EdgetuneError, TimeoutError):
            asked.cancel()
            return {}


def _gauges(name: str, help_: str, label: str, values: Mapping[str, float]) -> Metric:
    family = GaugeMetricFamily(f"edgetune_{name}", help_, labels=[label])
    for value, number in values.items():
        family.add_metric([value], number)
    return family


def _histogram(name: str, help_: str, times: Mapping[tuple[str, ...], Times], *labels: str) -> Metric:
    family = HistogramMetricFamily(f"edgetune_{name}", help_, labels=list(labels))
    for values, one in times.items():
        bounds: list[Any] = [*map(str, BOUNDS_S), "+Inf"]
        family.add_metric(list(values), list(zip(bounds, itertools.accumulate(one.counts), strict=True)), one.sum_s)
    return family
