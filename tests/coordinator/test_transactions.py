"""What the ledger's transactions keep true whatever comes in whatever order: thousands of short lives of a run."""

from __future__ import annotations

import random
import sqlite3
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator import publish
from coordinator.stores import Ask, offers, rows, runs, schema, updates
from wire import run_spec
from wire.delta import Layout, Tensor
from wire.errors import Refused
from wire.messages import Contribution, Metrics, ReleaseManifest, Task

LAYOUT = Layout((Tensor("w", (4,)),))
BASE, SECOND, ROUNDS = "b" * 64, 1_000_000, 4
COHORTS: dict[str, dict[str, Any]] = {
    "rounds": {"goal": 3, "minimum": 2},
    "buffers": {"mode": "async", "buffer": 3, "max_staleness": 1, "minimum": 2},
}
ACTIONS = {"ask": 9, "send": 8, "leave": 2, "wait": 5, "combine": 3, "pause": 1, "resume": 2, "stop": 0.05}
"""And how often each is done."""
LENGTH = 80


class Life:
    """A run in a ledger in memory, the tasks that its devices hold, and the receipts that they have."""

    def __init__(self, cohort: dict[str, Any]) -> None:
        self.db, self.now = sqlite3.connect(":memory:", isolation_level=None), SECOND
        schema.migrate(self.db, 0, "memory")
        table = {"name": "run", "base": {"model": "toy", "format": "toy", "digest": BASE}, "rounds": ROUNDS}
        rest = {"method": {"id": "lora"}, "codec": "float32"}
        limits = {"deadline_s": 5.0, "over_selection": 1.5, "max_attempts": 3}
        self.run = run_spec.parse(table | rest | {"cohort": cohort | limits})
        release = publish.initial(self.run, LAYOUT, "a" * 64)
        runs.create_run(self.db, self.run, LAYOUT, release, self.now)
        self.tasks: list[tuple[str, Task]] = []
        self.receipts: list[tuple[str, int, int]] = []

    def do(self, action: str, device: int, seconds: int) -> None:
        name = f"d{device}"
        match action:
            case "ask":
                answer = offers.offer(self.db, Ask(name, ()), self.now)
                if answer.task is not None:
                    self.tasks.append((name, answer.task))
            case "send" if self.tasks:
                self._send(*self.tasks[(device * 7 + seconds) % len(self.tasks)])
            case "leave" if self.tasks:
                who, task = self.tasks[-1]
                offers.leave(self.db, who, "run", task.round, task.attempt, self.now)
            case "wait":
                self.now += seconds * SECOND
                runs.tick(self.db, self.now)
            case "combine":
                self._combine()
            case "pause" | "resume" | "stop":
                runs.control(self.db, "run", action, "", self.now)

    def _send(self, who: str, task: Task) -> None:
        digest = "" if task.kind == "evaluate" else "d" * 64
        key = (who, "run", task.round, task.attempt)
        offered = Contribution(*key, digest, 36 if digest else 0, 3, BASE, task.release_digest, Metrics())
        updates.accept(self.db, offered, self.now)
        if digest and (who, task.round, task.attempt) not in self.receipts:
            self.receipts.append((who, task.round, task.attempt))

    def _combine(self) -> None:
        for _, sealed in runs.sealed(self.db):
            parent = rows.read_release(self.db, "run", sealed.base_version)
            names = (self.run.digest, LAYOUT.digest, parent.digest, f"{sealed.number:064x}")
            assert runs.publish(
                self.db, "run", sealed, ReleaseManifest("run", sealed.number, *names, None, ()), self.now
            )

    def rows(self, query: str) -> list[Any]:
        return self.db.execute(query).fetchall()

    def check(self) -> None:
        alive = self.rows("SELECT number, state FROM rounds WHERE state IN ('open', 'sealed') ORDER BY number")
        assert [state for _, state in alive[:-1]] == ["sealed"] * len(alive[:-1]), "only the newest takes updates"
        versions = [version for (version,) in self.rows("SELECT version FROM releases ORDER BY version")]
        assert versions == list(range(len(versions))) and len(versions) <= ROUNDS + 1
        state = rows.read_run(self.db, "run").state
        assert alive if state in ("running", "paused") else all(s == "sealed" for _, s in alive)
        stored = self.rows("SELECT device, number, attempt FROM contributions WHERE digest <> ''")
        assert sorted(stored) == sorted(self.receipts), "a receipt for each update, and an update for each receipt"
        self._check_counts()

    def _check_counts(self) -> None:
        newest = self.rows(
            "SELECT number, attempt, goal, accepted, max_staleness FROM rounds r WHERE attempt ="
            " (SELECT MAX(attempt) FROM rounds WHERE run = r.run AND number = r.number)"
        )
        landed = Counter[tuple[str, int]]()
        for number, attempt, goal, accepted, most in newest:
            counted = rows.contributions(self.db, "run", number, attempt)
            assert len(counted) == accepted <= goal
            assert all(0 <= c.staleness <= most if c.staleness is not None else most is None for c in counted)
            landed.update((c.device, number) for c in counted)
        assert set(landed.values()) <= {1}, "a device's part in a round is one update"
        if newest[0][4] is not None:
            assert sum(landed.values()) >= len(self.receipts), "nothing that has a receipt is left behind"


@pytest.mark.parametrize("cohort", COHORTS)
@given(seed=st.integers(0, 1 << 32))
@settings(max_examples=40)
def test_whatever_happens_every_receipt_counts_once_and_a_refusal_changes_nothing(cohort: str, seed: int) -> None:
    life, chance = Life(COHORTS[cohort]), random.Random(seed)
    for number, action in enumerate(chance.choices(list(ACTIONS), list(ACTIONS.values()), k=LENGTH), start=1):
        before = life.db.total_changes
        try:
            life.do(action, chance.randrange(5), chance.randrange(4))
        except Refused:
            assert life.db.total_changes == before
        if number % 5 == 0:
            life.check()


@pytest.mark.parametrize("cohort", COHORTS)
def test_a_run_that_devices_keep_asking_for_comes_to_its_end(cohort: str) -> None:
    life = Life(COHORTS[cohort])
    for turn in range(60):
        life.do("ask", turn % 5, 0)
        if life.tasks:
            try:
                life._send(*life.tasks[-1])
            except Refused:
                life.tasks.pop()
        life.do("combine", 0, 0)
        life.check()
    assert rows.read_run(life.db, "run").state == "done"
    assert [v for (v,) in life.rows("SELECT version FROM releases ORDER BY version")] == list(range(ROUNDS + 1))
