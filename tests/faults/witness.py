"""Sees every commit of the simulation as it is made, and says what rows must not do between one and the next.

The offline checker (`invariants.py`) reads a store as it lies; what a deadline was by a clock that nobody could bend, and
which release a device was really given, only a witness knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from coordinator.aggregators.staleness import discount, fitted
from coordinator.rounds import Round
from coordinator.stores.connection import Connection
from tests.faults.invariants import ROUND_COLUMNS
from wire.messages import ReleaseManifest
from wire.run_spec import RunSpec

Key = tuple[int, int]
_ROUNDS = f"SELECT {', '.join(ROUND_COLUMNS)} FROM rounds ORDER BY number, attempt"  # constants
_GIVEN = (
    "SELECT c.device, a.version, c.weight FROM contributions c JOIN assignments a ON a.run = c.run AND a.number = c.number"
    " AND a.attempt = c.attempt AND a.device = c.device WHERE c.landed = ?"
)


class Witness:
    """`wrong` is told what should not have been."""

    def __init__(self, run: RunSpec, wrong: Callable[[str], None]) -> None:
        self._run, self._wrong = run, wrong
        self._rounds: dict[Key, Round] = {}
        self._began_us: dict[Key, int] = {}
        self._paused: dict[Key, int] = {}
        """When a pause began; and how long those before it were."""
        self._stood_us: dict[Key, int] = {}
        self._releases = 1

    def look(self, db: Connection, now_us: int) -> None:
        """After a commit, with the store's clock as it is."""
        for row in db.execute(_ROUNDS).fetchall():
            new = Round(*row)
            key = (new.number, new.attempt)
            old = self._rounds.get(key)
            if new != old:
                self._rounds[key] = new
                self._clock(key, old, new, now_us)
                if old is not None:
                    self._change(key, old, new, now_us, db)
        for (manifest,) in db.execute("SELECT manifest FROM releases WHERE version >= ?", (self._releases,)).fetchall():
            self._release(ReleaseManifest.parse(manifest), db)

    def _clock(self, key: Key, old: Round | None, new: Round, now_us: int) -> None:
        if new.deadline_us is not None and (old is None or old.deadline_us is None):
            self._began_us[key] = now_us
        if new.paused_us is not None and (old is None or old.paused_us is None):
            self._paused[key] = now_us
        if new.paused_us is None and old is not None and old.paused_us is not None and key in self._began_us:
            self._stood_us[key] = self._stood_us.get(key, 0) + now_us - max(self._paused[key], self._began_us[key])

    def _change(self, key: Key, old: Round, new: Round, now_us: int, db: Connection) -> None:
        where = f"round {new.number} (attempt {new.attempt})"
        if old.state in ("published", "abandoned"):
            self._wrong(f"{where} had ended and goes on: {old.state} → {new.state}")
        if old.state == "sealed" and (new.accepted != old.accepted or new.state == "open"):
            self._wrong(f"{where} was sealed and changes")
        if new.accepted > old.accepted and new.max_staleness is None and self._over(key, new, now_us):
            self._wrong(f"{where} takes an update after its deadline")
        ends_short = old.state == "open" and new.state != "open" and new.accepted < new.goal
        if ends_short and not self._over(key, new, now_us) and not _stopped(db):
            self._wrong(f"{where} ends with {new.accepted} of {new.goal} before its deadline")

    def _over(self, key: Key, new: Round, now_us: int) -> bool:
        """Its clock stands still while it is paused."""
        if key not in self._began_us:
            return False
        at_us = now_us if new.paused_us is None else self._paused[key]
        return at_us - self._began_us[key] - self._stood_us.get(key, 0) >= new.length_us

    def _release(self, release: ReleaseManifest, db: Connection) -> None:
        """Of a buffer: each update counts by the release that its device was given."""
        self._releases = release.version + 1
        if self._run.cohort.mode != "async":
            return
        given = {
            device: (version, weight) for device, version, weight in db.execute(_GIVEN, (release.version,)).fetchall()
        }
        old = {share.device: release.version - 1 - given[share.device][0] for share in release.contributions}
        weights = fitted([given[share.device][1] * discount(old[share.device]) for share in release.contributions])
        for share, weight in zip(release.contributions, weights, strict=True):
            if share.staleness != old[share.device] or share.weight != weight:
                self._wrong(f"release {release.version} counts {share.device} as {share.staleness} releases old")


def _stopped(db: Connection) -> bool:
    rows: list[Any] = db.execute("SELECT decision FROM runs").fetchall()
    return rows == [("stopped",)]
