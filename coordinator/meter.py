"""What one coordinator process counts of itself: plain numbers, kept whether or not anybody asks (`metrics.py` shows them)."""

from __future__ import annotations

import bisect
import collections
import contextlib
import dataclasses
import functools
import inspect
import time
from collections.abc import Iterator
from typing import Any, cast

from coordinator.stores import Ledger
from wire.errors import Reason

BOUNDS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class Times:
    """How often something took at most each of BOUNDS_S (the last count: longer), and how long in all."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        self.sum_s = 0.0

    def took(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(BOUNDS_S, seconds)] += 1
        self.sum_s += seconds

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Counts what ends well and what does not alike."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.took(time.perf_counter() - began)


@dataclasses.dataclass
class Meter:
    """Bytes are of messages, without their frames. `ledger` is by the ledger's methods."""

    accepts: int = 0
    refusals: collections.Counter[Reason] = dataclasses.field(default_factory=collections.Counter)
    alarms: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    bytes_in: int = 0
    bytes_out: int = 0
    uploads: int = 0
    combining: Times = dataclasses.field(default_factory=Times)
    ledger: dict[str, Times] = dataclasses.field(default_factory=lambda: collections.defaultdict(Times))


class _TimedLedger:
    """Any ledger, with each of its transactions timed."""

    def __init__(self, ledger: Ledger, meter: Meter) -> None:
        self._ledger, self._meter = ledger, meter

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._ledger, name)
        return functools.partial(self._timed, name, method) if inspect.iscoroutinefunction(method) else method

    async def _timed(self, name: str, method: Any, *args: Any) -> Any:
        with self._meter.ledger[name].timed():
            return await method(*args)


def timed(ledger: Ledger, meter: Meter) -> Ledger:
    return cast(Ledger, _TimedLedger(ledger, meter))
