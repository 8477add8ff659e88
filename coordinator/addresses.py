"""Whether one certificate calls from two places at once. Of one process."""

from __future__ import annotations

from collections import OrderedDict
from urllib.parse import unquote

AT_ONCE_S = 60.0
"""A device that moves from one network to another calls from the new one alone: who returns to the old one this soon is two."""
REMEMBERED = 65_536
"""Certificates; of more, those heard longest ago are forgotten."""


class Addresses:
    """The last two addresses of each caller, and when it was heard there."""

    def __init__(self) -> None:
        self._heard = OrderedDict[str, dict[str, float]]()

    def are_two(self, key: str, address: str, now: float) -> bool:
        """Note a call of the holder of `key`; whether it has called from another address since it last called from here, both
        within AT_ONCE_S."""
        heard = self._heard.setdefault(key, {})
        self._heard.move_to_end(key)
        if len(self._heard) > REMEMBERED:
            self._heard.popitem(last=False)
        here = heard.pop(address, None)
        two = here is not None and any(here < there and now - here <= AT_ONCE_S for there in heard.values())
        heard[address] = now
        while len(heard) > 2:
            del heard[next(iter(heard))]
        return two


def of_peer(peer: str) -> str:
    """The host of what gRPC calls a peer.

    >>> of_peer("ipv4:192.0.2.7:50312"), of_peer("ipv6:%5B2001:db8::7%5D:50312")
    ('192.0.2.7', '2001:db8::7')
    """
    return unquote(peer).partition(":")[2].rpartition(":")[0].strip("[]")
