"""Addresses as people write them, HOST:PORT, and the names that a host may have. Whoever takes one takes it by this."""

from __future__ import annotations

import argparse
import ipaddress
import re
from collections.abc import Callable
from typing import TypeVar

from wire.errors import UserError

T = TypeVar("T")
DEFAULT_PORT = 7443
LAST_PORT = 65_535
_ADDRESS = re.compile(r"(?:\[(?P<six>[^\[\]]+)\]|(?P<host>[^:\[\]]+))(?::(?P<port>[0-9]+))?")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.IGNORECASE)
LONGEST_NAME = 253


def host(text: str) -> str:
    """A host name, in the letters that DNS has, or an IP address. Raises UserError for what is neither.

    >>> host("münchen.de"), host("::1")
    ('xn--mnchen-3ya.de', '::1')
    """
    if _is_ip(text):
        return text
    try:
        name = text if text.isascii() else text.encode("idna").decode()
    except UnicodeError:
        name = ""
    labels = name.split(".")
    if len(name) > LONGEST_NAME or not all(map(_LABEL.fullmatch, labels)) or labels[-1].isdigit():
        shown = text if len(text) <= 40 else f"{text[:40]}…"
        raise UserError(f"{shown!r}: expected a host name or an IP address")
    return name


def _is_ip(text: str) -> bool:
    try:
        return "%" not in text and bool(ipaddress.ip_address(text).compressed)
    except ValueError:
        return False


def parse(text: str, port: int | None = None) -> tuple[str, int]:
    """Host, without the brackets of an IPv6 address, and port; `port` where `text` has none. Raises UserError.

    >>> parse("[::1]:7443"), parse("fl.example.org", 7443)
    (('::1', 7443), ('fl.example.org', 7443))
    """
    found = _ADDRESS.fullmatch(text)
    if found is None or (found["port"] is None and port is None) or (found["six"] and not _is_ip(found["six"])):
        raise UserError(f"{text!r}: expected HOST:PORT, as in 127.0.0.1:7443 or [::1]:7443")
    number = int(found["port"][:6]) if found["port"] else port or 0
    if number > LAST_PORT:
        raise UserError(f"{text!r}: a port is 0 to {LAST_PORT}")
    return host(found["six"] or found["host"]), number


def joined(name: str, port: int) -> str:
    """HOST:PORT, with brackets where the host needs them.

    >>> joined("::1", 7443)
    '[::1]:7443'
    """
    return f"[{name}]:{port}" if ":" in name else f"{name}:{port}"


def listened_at(text: str) -> str:
    """An option's address to listen at."""
    return _option(lambda: joined(*parse(text)))


def called_at(text: str) -> str:
    """An option's address to call; without a port it is at DEFAULT_PORT."""
    address = _option(lambda: parse(text, DEFAULT_PORT))
    if address[1] == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: port 0 is no port to call")
    return joined(*address)


def named(text: str) -> str:
    """An option's host."""
    return _option(lambda: host(text))


def _option(read: Callable[[], T]) -> T:
    """What is wrong, as argparse wants it: it says the option's name."""
    try:
        return read()
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
