"""What is an address, and what only looks like one."""

from __future__ import annotations

import argparse

import pytest

from wire import addresses
from wire.errors import UserError
from wire.identity import Invitation


@pytest.mark.parametrize(
    ("text", "is_"),
    [
        ("127.0.0.1:0", ("127.0.0.1", 0)),
        ("0.0.0.0:65535", ("0.0.0.0", 65535)),
        ("[::]:7443", ("::", 7443)),
        ("fl_one.example.org:1", ("fl_one.example.org", 1)),
        ("münchen.de:7443", ("xn--mnchen-3ya.de", 7443)),
    ],
)
def test_a_host_and_a_port_are_an_address(text: str, is_: tuple[str, int]) -> None:
    assert addresses.parse(text) == is_
    assert addresses.parse(addresses.joined(*is_)) == is_


@pytest.mark.parametrize("text", ["foo", "127.0.0.1", ":7601", "", "foo:bar", "foo:-1", "::1:7443", "[foo]:1", "[::1]"])
def test_to_listen_takes_a_host_and_a_port(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected HOST:PORT"):
        addresses.listened_at(text)


@pytest.mark.parametrize("text", ["", ":7443", "foo:bar", "http://foo", "http://foo:7443", "foo:1:2", "::1", "a b:1"])
def test_what_is_no_address_is_not_called(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"expected (HOST:PORT|a host name)"):
        addresses.called_at(text)


@pytest.mark.parametrize("text", ["127.0.0.1:65536", "127.0.0.1:99999", f"127.0.0.1:{'9' * 5000}"])
def test_a_port_beyond_the_last_is_neither_listened_at_nor_called(text: str) -> None:
    for take in (addresses.listened_at, addresses.called_at):
        with pytest.raises(argparse.ArgumentTypeError, match="a port is 0 to 65535"):
            take(text)


def test_a_coordinator_without_a_port_is_at_the_default_one_and_none_is_at_port_0() -> None:
    assert [addresses.called_at(host) for host in ("fl.example.org", "[::1]")] == ["fl.example.org:7443", "[::1]:7443"]
    with pytest.raises(argparse.ArgumentTypeError, match="no port to call"):
        addresses.called_at("127.0.0.1:0")


@pytest.mark.parametrize("text", ["127.0.0.1", "::1", "localhost", "münchen.de", "a" * 63, "4everyone.example"])
def test_a_name_that_dns_has_and_an_ip_address_are_hosts(text: str) -> None:
    assert addresses.host(text).isascii()


@pytest.mark.parametrize(
    "text", ["", "bad host!", "a" * 300, "a..b", "-a", "*.example.org", "127.0.0.300", "fe80::1%eth0", "ü" * 80, "a\nb"]
)
def test_what_no_certificate_can_name_is_no_host(text: str) -> None:
    with pytest.raises(UserError, match="expected a host name or an IP address") as caught:
        addresses.host(text)
    assert len(str(caught.value)) < 120


def test_an_invitation_to_a_port_that_is_none_is_refused() -> None:
    with pytest.raises(UserError, match="a port is 0 to 65535"):
        Invitation.parse(f"edgetune://127.0.0.1:99999/{'A' * 43}/{'A' * 22}")
