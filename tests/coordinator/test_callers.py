"""How often an address may try, and whether one certificate is in two places."""

from __future__ import annotations

import pytest

from coordinator.addresses import Addresses, of_peer
from coordinator.rates import REMEMBERED, Rate, Tries
from wire.errors import Reason, Refused


def refused_for_s(tries: Tries, address: str, now: float) -> float:
    """Seconds to wait, 0 if it was let through."""
    try:
        tries.take(address, now)
    except Refused as refused:
        return {Reason.TOO_OFTEN: refused.retry_after_s or -1.0}[refused.reason]
    return 0.0


def test_an_address_has_its_burst_and_then_its_rate() -> None:
    tries = Tries(Rate(3, 0.5), Rate(100, 100))
    assert [refused_for_s(tries, "a", 10.0) for _ in range(4)] == [0, 0, 0, 2.0]
    assert refused_for_s(tries, "b", 10.0) == 0
    assert refused_for_s(tries, "a", 11.0) == pytest.approx(1.0)  # having asked too early costs nothing
    assert refused_for_s(tries, "a", 12.0) == 0


def test_all_addresses_together_have_a_rate_too() -> None:
    tries = Tries(Rate(3, 1), Rate(5, 1))
    assert [refused_for_s(tries, f"a{n}", 0.0) > 0 for n in range(7)] == [False] * 5 + [True] * 2


def test_addresses_without_end_take_no_memory_without_end() -> None:
    tries = Tries(Rate(1, 1), Rate(1e9, 1))
    for n in range(REMEMBERED + 10):
        tries.take(str(n), 0.0)
    assert len(tries._buckets) == REMEMBERED


@pytest.mark.parametrize(
    ("calls", "two"),
    [
        ([("a", 0), ("a", 1), ("a", 2)], False),
        ([("a", 0), ("b", 1), ("b", 2), ("b", 30)], False),  # it has moved
        ([("a", 0), ("b", 1), ("a", 2)], True),
        ([("a", 0), ("b", 1), ("c", 2), ("b", 3)], True),
        ([("a", 0), ("b", 50), ("a", 100)], False),  # home again
        ([("a", 0), ("b", 1), ("c", 2), ("d", 3)], False),
    ],
)
def test_who_returns_at_once_to_where_it_was_is_in_two_places(calls: list[tuple[str, float]], two: bool) -> None:
    addresses = Addresses()
    assert any([addresses.are_two("key", address, now) for address, now in calls]) is two


def test_two_certificates_in_two_places_are_no_concern() -> None:
    addresses = Addresses()
    assert not any(addresses.are_two(key, where, n) for n, (key, where) in enumerate([("k", "a"), ("l", "b")] * 3))


@pytest.mark.parametrize(
    ("peer", "host"),
    [("ipv4:192.0.2.7:50312", "192.0.2.7"), ("ipv6:%5B::1%5D:1", "::1"), ("ipv6:[::1]:1", "::1"), ("unix:", "")],
)
def test_a_peers_host_is_read_as_grpc_writes_it(peer: str, host: str) -> None:
    assert of_peer(peer) == host
