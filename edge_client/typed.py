"""What is typed on a command line, refused where it is typed: types of argparse."""

from __future__ import annotations

import argparse
import re

from wire.run_spec import NAME

LONGEST_RELEASE = 9
"""Digits."""


def memory(text: str) -> int:
    """Bytes of "2G", "800M" or "1500000000".

    >>> memory("1.5G")
    1610612736
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write 2G or 800M")
    size = int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no memory at all; leave it out for no limit")
    return size


def device_name(text: str) -> str:
    """A name that a device may have."""
    if not NAME.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{text!r}: 1 to 64 of a-z 0-9 . _ -, starting with a letter or digit")
    return text


def positive(text: str) -> int:
    """A whole number of at least 1."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def release_number(text: str) -> int:
    """The number of a release, within what a message can say."""
    if not (text.isdecimal() and len(text) <= LONGEST_RELEASE):
        raise argparse.ArgumentTypeError(f"{text!r} is not the number of a release: 0 or more")
    return int(text)
