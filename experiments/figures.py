"""Figures of a command line, refused where they are typed: types of argparse."""

from __future__ import annotations

import argparse
import math


def positive(text: str) -> float:
    """
    >>> positive("1e-3")
    0.001
    """
    if not 0 < (figure := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return figure


def not_negative(text: str) -> float:
    """
    >>> not_negative("0")
    0.0
    """
    if not 0 <= (figure := _number(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: expected 0 or a number above it")
    return figure


def share(text: str) -> float:
    """
    >>> share("0.9")
    0.9
    """
    if not 0 < (figure := _number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share, above 0 and at most 1")
    return figure


def _number(text: str) -> float:
    """What is no number is none that fits."""
    try:
        return float(text)
    except ValueError:
        return math.nan
