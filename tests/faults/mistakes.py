"""Seeded bugs for the simulation: mistakes that only another order of events shows. Each is caught, or the simulation sees
nothing."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

from coordinator import publish, rounds
from coordinator.stores import rows, runs
from tests.faults.world import Replacement, World
from wire.messages import ENDED


def publish_without_comparing() -> list[Replacement]:
    """Whoever has combined a round publishes it, whatever has become of the round meanwhile."""

    def published(db: Any, name: str, done: Any, release: Any, now_us: int) -> bool:
        db.execute("DELETE FROM releases WHERE run = ? AND version = ?", (name, release.version))
        rows.update_round(db, name, dataclasses.replace(done, state="published"))
        rows.insert_release(db, release, done.attempt, now_us)
        if rows.run_state(db, name) not in ENDED:
            runs._open(db, name, rounds.after(rows.read_run(db, name).spec, done, now_us), now_us)
        return True

    return [(runs, "publish", published)]


def accept_in_any_state() -> list[Replacement]:
    """An update is taken by a round that has closed."""
    return [(rounds, "_in", lambda state, wanted: state)]


def staleness_at_the_fold() -> list[Replacement]:
    """How old an update's start is, is reckoned as it is combined, from the round of its task."""
    combine = publish.combine

    def combined(by: Any, parent: Any, accepted: Any, blobs: Any) -> Any:
        reckoned = [dataclasses.replace(c, staleness=max(0, parent.version + 1 - c.round)) for c in accepted]
        return combine(by, parent, reckoned if by.spec.cohort.mode == "async" else accepted, blobs)

    return [(publish, "combine", combined)]


def deadline_by_its_own_clock() -> list[Replacement]:
    """A replica reads its own machine's clock, up to ten minutes off, and not the store's."""
    store_us = World.now_us

    def own_us(self: Any, life: Any) -> int:
        skew_s = zlib.crc32(life.name.encode()) % 1200 - 600
        return store_us(self, life) + skew_s * 1_000_000

    return [(World, "now_us", own_us)]


MISTAKES: dict[str, Callable[[], list[Replacement]]] = {
    mistake.__name__: mistake
    for mistake in (
        publish_without_comparing,
        accept_in_any_state,
        staleness_at_the_fold,
        deadline_by_its_own_clock,
    )
}
