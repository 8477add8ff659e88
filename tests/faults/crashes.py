"""One crash at a time, at every named step of the embedded store: a child process runs a whole small federation against
the coordinator's own code, kill -9 ends it at the step, the store is checked as it lies, another child goes on from it,
and the store is checked again.

The seam is the store's own: statements go through a session, files through `os`. A step is named after what it is about to
do, `INSERT INTO contributions` or `file link`, and a crash is a step and which of its arrivals; what only reads is no
step. Run as a program, so that children are forked from a process without threads:

    python -m tests.faults.crashes FOLDER [BUG]
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from coordinator import closing, publish
from coordinator.bell import Bell
from coordinator.core import Core
from coordinator.meter import Meter, Times
from coordinator.service import Federation
from coordinator.stores import Place, Store, files, sqlite
from tests.faults import bugs, invariants
from wire import run_spec, spec
from wire.delta import Delta, Layout, Tensor
from wire.errors import EdgetuneError
from wire.messages import Contribution, Metrics, Task

LAYOUT = Layout((Tensor("w", (4, 4)),))
RUN = run_spec.parse(
    {
        "name": "run",
        "base": {"model": "toy", "format": "toy", "digest": "b" * 64},
        "rounds": 2,
        "cohort": {"goal": 2, "minimum": 1, "deadline_s": 600.0, "over_selection": 1.5},
        "method": {"id": "lora"},
        "codec": "float32",
        "server_optimizer": {"id": "momentum"},
    }
)
DEVICES = ("d1", "d2")
TURNS = 20
"""Looks around the federation within which a run of two rounds must have ended."""


@dataclasses.dataclass(frozen=True)
class Crash:
    """`arrival` counts from 1."""

    step: str
    arrival: int


class Steps:
    """Counts arrivals at each step; the one that `crash` names is the last thing this process does."""

    def __init__(self, crash: Crash | None) -> None:
        self.arrivals: dict[str, int] = {}
        self._crash = crash

    def reach(self, step: str) -> None:
        self.arrivals[step] = self.arrivals.get(step, 0) + 1
        if self._crash == Crash(step, self.arrivals[step]):
            os.kill(os.getpid(), signal.SIGKILL)


class _Os:
    """`os` for the file store, with a step before each call that changes something and after the last."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name == "fsync":
            return lambda handle: None  # what is in the page cache outlives kill -9: no sync is waited for
        if name not in ("write", "link", "utime"):
            return real

        def stepped(*args: Any) -> Any:
            self._steps.reach(f"file {name}")
            result = real(*args)
            self._steps.reach(f"file {name} done")
            return result

        return stepped


def instrument(steps: Steps) -> None:
    """Put the steps into this process's store."""
    vars(files)["os"] = _Os(steps)
    session: Any = sqlite._Session
    execute, commit = session.execute, session.commit
    changed: set[int] = set()

    def stepped(self: Any, sql: str, values: Any = (), /) -> sqlite3.Cursor:
        if sql.startswith(("INSERT", "UPDATE", "DELETE")):
            steps.reach(" ".join(re.split(r"[\s(]+", sql)[:3]))
            changed.add(id(self))
        cursor: sqlite3.Cursor = execute(self, sql, values)
        return cursor

    def committed(self: Any) -> None:
        if id(self) in changed:
            steps.reach("COMMIT")
        commit(self)
        if id(self) in changed:
            steps.reach("COMMIT done")
        changed.clear()

    session.execute, session.commit = stepped, committed


async def federation(place: Place, journal: Path) -> None:
    """Two rounds and the evaluation, from wherever the store stands. Receipts are journalled outside the store."""
    store = place.open()
    with ThreadPoolExecutor(1) as compute, ThreadPoolExecutor(1) as disk:
        served = Federation(Core(store, compute, disk, Bell(), Bell(), Bell(), Meter()))
        adapter = store.blobs.put(bytes(4 * LAYOUT.size))
        await store.ledger.create_run(RUN, LAYOUT, publish.initial(RUN, LAYOUT, adapter))
        for _ in range(TURNS):
            if (await store.ledger.status(RUN.name)).state != "running":
                break
            await _visitor(store)
            for device in DEVICES:
                if task := (await store.ledger.offer(device, ())).task:
                    contribution, payload = update(task, device)
                    receipt = await served._receive(contribution, payload)
                    invariants.note(journal, receipt)
            await closing._close_due(store, compute, Bell(), Times(), None)
    await store.ledger.close()


async def _visitor(store: Store) -> None:
    """A device that takes a task and gives it back."""
    if task := (await store.ledger.offer("visitor", ())).task:
        await store.ledger.leave("visitor", task.run, task.round, task.attempt)


def update(task: Task, device: str) -> tuple[Contribution, bytes]:
    """What a device sends in a round: always the same bytes."""
    payload = b""
    if task.kind == "train":
        chain = RUN.chain()
        assert chain is not None
        seed = hashlib.sha256(f"{device} {task.round}".encode()).digest()
        vector = np.frombuffer(seed[: LAYOUT.size], np.uint8).astype(np.float32) / np.float32(256)
        payload, _ = chain.encode(Delta(LAYOUT, vector), chain.init(LAYOUT))
    digest = spec.bytes_digest(payload) if payload else ""
    base = RUN.base.digest
    metrics = Metrics(loss_before=1.0, held_out_tokens=1)
    mine = Contribution(
        device, task.run, task.round, task.attempt, digest, len(payload), 1, base, task.release_digest, metrics
    )
    return mine, payload


def in_child(work: Callable[[], Any]) -> int:
    """Run in a fork; how it ended, as `os.waitstatus_to_exitcode` says it."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def attempt(folder: Path, crash: Crash | None, bug: str | None) -> list[str]:
    """One crash in a fresh store, and all that is wrong after it; steps of a run without a crash lie in `steps.json`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    place, journal, told = Place.of(str(folder / "store"), None), folder / "journal", folder / "faults.json"

    def crashing() -> None:
        steps = Steps(crash)
        instrument(steps)
        bugs.BUGS[bug][0]() if bug else None
        asyncio.run(federation(place, journal))
        (folder / "steps.json").write_text(json.dumps(steps.arrivals))

    def going_on() -> None:
        instrument(Steps(None))
        bugs.BUGS[bug][0]() if bug else None
        found = asyncio.run(invariants.violations_at(place, [journal], ended=False))
        try:
            asyncio.run(federation(place, journal))
            found += asyncio.run(invariants.violations_at(place, [journal], ended=True))
        except EdgetuneError as error:
            found.append(f"a coordinator cannot go on: {error}")
        told.write_text(json.dumps(found))

    died = in_child(crashing)
    if died != (0 if crash is None else -signal.SIGKILL):
        return [f"the step was not reached, or something else went wrong first: exit {died}"]
    if in_child(going_on) != 0:
        return ["checking failed"]
    found: list[str] = json.loads(told.read_text())
    return found


def crashes(folder: Path, bug: str | None) -> list[Crash]:
    """Every arrival at every step that a run without a crash reaches. Statements of one transaction are all undone alike:
    of each kind the first will do."""
    if found := attempt(folder, None, bug):
        raise AssertionError(f"wrong without any crash: {found}")
    arrivals: dict[str, int] = json.loads((folder / "steps.json").read_text())
    lasting = {step: range(1, last + 1) for step, last in arrivals.items() if step.startswith(("COMMIT", "file"))}
    undone = {step: range(1, 2) for step in arrivals if step not in lasting}
    every = [Crash(step, n) for step, counted in (lasting | undone).items() for n in counted]
    return [crash for crash in every if bug is None or crash.step == bugs.BUGS[bug][1]]


def main(folder: Path, bug: str | None) -> None:
    """A line of JSON a crash; with a seeded bug, of its step, until the first violation."""
    for crash in crashes(folder, bug):
        found = attempt(folder, crash, bug)
        print(json.dumps({"step": crash.step, "arrival": crash.arrival, "faults": found}), flush=True)
        if bug and found:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
