"""Who is asked first, and when the others should come again. Pure: chance and the clock come in."""

from __future__ import annotations

import hashlib

HELD = 500
"""Calls of waiting devices that one process holds. A fleet of this size hears of new work the moment there is some."""
CALLS_PER_S = 50.0
"""How many devices of a larger crowd come back to one process each second."""
STORE_CALLS_PER_S = 200.0
"""And how many to all replicas together: whichever takes it, a check-in is a transaction that the others wait for."""
LONGEST_S = 300.0
"""The longest spread: a round may end early, and a paused run go on."""
LEAST_S = 1.0


def retry_after_s(work_in_s: float | None, waiting: int, chance: float, replicas: int = 1) -> float:
    """Seconds until a device should ask again; `chance` in [0, 1) is its own.

    `work_in_s`: when there will be work at the latest, None where nobody knows, as of a paused run. `waiting`: how many
    devices wait for this process, of the `replicas` that share them evenly. A crowd comes back evenly, over the time in which
    it can be served, and not before there is work, unless that is further off than this time. A small fleet is not sent
    away: its calls are held.

    >>> retry_after_s(3600.0, 8, 0.5), retry_after_s(60.0, 10_000, 0.5), retry_after_s(None, 10_000, 0.0)
    (0.5, 160.0, 200.0)
    >>> retry_after_s(None, 5_000, 0.0, replicas=2), retry_after_s(None, 1_250, 0.0, replicas=8)
    (100.0, 50.0)
    """
    if waiting <= HELD:
        return LEAST_S * chance
    spread = min(LONGEST_S, waiting / min(CALLS_PER_S, STORE_CALLS_PER_S / replicas))
    return min(spread, spread if work_in_s is None else work_in_s) + chance * spread


def lot(seed: int, run: str, number: int, attempt: int, device: str) -> bytes:
    """Devices that ask together are taken in the order of their lots: another order each round, in which nothing that a
    device does changes its place, least of all being the first to ask."""
    return hashlib.sha256(f"edgetune/{seed}/{run}/{number}/{attempt}/{device}".encode()).digest()
