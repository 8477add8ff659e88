"""How often something may be tried, by one address and by all together. Of one process; pure but for what it remembers."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict

from wire.errors import Reason, Refused

REMEMBERED = 4096
"""Addresses; of more, those that have waited longest are forgotten, and the rate of all still holds."""


@dataclasses.dataclass(frozen=True)
class Rate:
    """`burst` at once, and `per_s` in the long run."""

    burst: float
    per_s: float


@dataclasses.dataclass
class _Bucket:
    left: float
    at: float

    def wait_s(self, rate: Rate, now: float) -> float:
        """Seconds until the next may be tried; 0 for now."""
        self.left, self.at = min(rate.burst, self.left + (now - self.at) * rate.per_s), now
        return max(0.0, (1.0 - self.left) / rate.per_s)


class Tries:
    """Tries by address, and of all."""

    def __init__(self, each: Rate, all_: Rate) -> None:
        self._each, self._all, self._buckets = each, all_, OrderedDict[str, _Bucket]()
        self._together = _Bucket(all_.burst, 0.0)

    def take(self, address: str, now: float) -> None:
        """One try at `now` in seconds of a monotonic clock. Raises Refused with the time to wait, and then it costs nothing."""
        own = self._buckets.setdefault(address, _Bucket(self._each.burst, now))
        self._buckets.move_to_end(address)
        if len(self._buckets) > REMEMBERED:
            self._buckets.popitem(last=False)
        wait_s = max(own.wait_s(self._each, now), self._together.wait_s(self._all, now))
        if wait_s > 0:
            raise Refused(Reason.TOO_OFTEN, f"too many enrolments at once; try again in {wait_s:.0f} s", wait_s)
        own.left, self._together.left = own.left - 1, self._together.left - 1
