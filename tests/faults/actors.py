"""What the processes of a schedule are: a replica of the coordinator, a client, whoever creates the run, and the judge.

Each is the product's own code; what is not is the training, which gives a vector that follows from device and round. Times
that a deployment waits for seconds or minutes are shortened alike in all of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import json
import os
import signal
import sqlite3
import time
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np

from coordinator import closing, core, guards, publish, refusals, service
from coordinator.identities import Doors
from coordinator.serve import Serving, serve
from coordinator.stores import Place, files, group_commit, postgresql, sqlite
from edge_client import calls, participate, transport, uploads
from edge_client import state as device_state
from edge_client.session import Device, Session
from edge_client.state import DeviceState, Pending
from edge_client.transport import Connection
from tests.faults import bugs, draws, invariants
from tests.faults.draws import LAYOUT, Life, Scene
from tests.faults.flaky_links import FlakyLink, append
from tests.faults.steps import Steps, instrument
from wire import spec
from wire.contract import CONTRACT, Action, after
from wire.delta import Delta, Layout
from wire.errors import Reason, Refused
from wire.messages import Contribution, Metrics, Receipt, Task
from wire.run_spec import RunSpec

DISHONEST = {reason.value for reason, rule in CONTRACT.items() if rule.action is Action.DROP} | {Reason.BAD_CHUNK.value}
"""What nothing that a link or a crash does can make of an honest update."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """Where a schedule plays: a folder for all that its processes leave, and the store."""

    folder: Path
    place: Place

    @property
    def addresses(self) -> Path:
        return self.folder / "addresses"

    def address(self, number: int) -> Path:
        """Where a replica is, for all who look for one."""
        return self.addresses / str(number)

    def aside(self, number: int) -> Path:
        """The same of one that is stopped, which nobody should look for."""
        return self.folder / f"stopped-{number}"

    @property
    def calm(self) -> Path:
        """There from when no fault comes any more."""
        return self.folder / "calm"

    @property
    def log(self) -> Path:
        """A line for each fault that came."""
        return self.folder / "faults.jsonl"

    def journals(self) -> list[Path]:
        return sorted(self.folder.glob("journal-*"))


def quicken() -> None:
    """Shorten what is waited for. A replica that is stopped for 0.3 s or longer is past all of it."""
    for module, name, value in (
        (closing, "IDLE_S", 0.1),
        (core, "POLL_S", 0.3),
        (service, "POLL_S", 0.3),
        (sqlite, "LOOK_S", 0.05),
        (postgresql, "STALLED_S", 1),
        (postgresql, "RECONNECT_PAUSE_S", 0.05),
        (group_commit, "TRY_FOR_S", 5.0),
        (refusals, "RETRY_AFTER_S", 0.05),
        (files, "RETRY_AFTER_S", 0.05),
        (calls, "FIRST_CONTACT_S", 60.0),
        (calls, "FIRST_PAUSE_S", 0.02),
        (calls, "LONGEST_PAUSE_S", 0.2),
        (transport, "CALL_S", 1.0),
        (transport, "transfer_s", lambda size: 2.0),
        (uploads, "transfer_s", lambda size: 2.0),
        (participate, "HOLD_S", 1.0),
        (participate, "LONGEST_PAUSE_S", 0.1),
    ):
        assert hasattr(module, name), name
        setattr(module, name, value)
    vars(device_state)["os"] = SimpleNamespace(fsync=lambda handle: None)  # as in `steps.py`
    calls.Calls._call.__defaults__ = (2.0,)
    calls.Calls._unary.__defaults__ = (2.0,)
    calls.OPTIONS[1:3] = [("grpc.initial_reconnect_backoff_ms", 20), ("grpc.max_reconnect_backoff_ms", 100)]
    object.__setattr__(guards.DEFAULTS, "disk_reserve_bytes", 0)
    object.__setattr__(guards.DEFAULTS, "retry_after_s", 0.05)


def create(stage: Stage, scene: Scene) -> None:
    async def created() -> None:
        store = stage.place.open()
        adapter = store.blobs.put(bytes(4 * LAYOUT.size))
        await store.ledger.create_run(scene.run, LAYOUT, publish.initial(scene.run, LAYOUT, adapter))
        await store.ledger.close()

    asyncio.run(created())


def replica(stage: Stage, number: int, life: Life, bug: str | None) -> None:
    quicken()
    _set_clock(life.skew_s)
    instrument(Steps(_Struck(stage, number, life)))
    if bug:
        bugs.BUGS[bug].plant()

    def ready(doors: Doors) -> None:
        aside = stage.folder / f"address-{number}"
        aside.write_text(doors.devices)
        aside.replace(stage.address(number))

    asyncio.run(serve(stage.place.open(), Serving(Doors("127.0.0.1:0")), ready))


class _Struck:
    """Told of each step of a replica, it does what its life has for it."""

    def __init__(self, stage: Stage, number: int, life: Life) -> None:
        self._stage, self._number, self._strikes = stage, number, life.strikes
        self._expected = set[draws.Strike]()
        """Those whose transaction has begun."""

    def __call__(self, step: str, arrival: int) -> bool:
        for strike in self._strikes:
            if self._is_due(strike, step, arrival) and not self._stage.calm.exists():
                return self._struck(strike, arrival)
        return False

    def _is_due(self, strike: draws.Strike, step: str, arrival: int) -> bool:
        reached = strike.step == step and strike.first <= arrival <= strike.last
        if strike.then is None:
            return reached
        if reached:
            self._expected.add(strike)
        if strike not in self._expected or step != strike.then:
            return False
        self._expected.discard(strike)
        return True

    def _struck(self, strike: draws.Strike, arrival: int) -> bool:
        said = {"what": f"{strike.what} at step", "step": strike.place, "replica": self._number}
        append(self._stage.log, {**said, "arrival": arrival, "state": _state(self._stage.place)})
        if strike.what == "full":
            return True
        os.kill(os.getpid(), signal.SIGKILL if strike.what == "kill" else signal.SIGSTOP)
        return False


def _state(place: Place) -> str:
    """Where the run stands as committed, such as `train sealed 2/2`: asked of the store apart from all connections."""
    query = "SELECT kind, state, accepted, goal FROM rounds ORDER BY number DESC, attempt DESC LIMIT 1"
    with contextlib.suppress(Exception):  # a store that does not answer now
        if "://" not in place.ledger:
            with contextlib.closing(sqlite3.connect(f"file:{place.ledger}/ledger.sqlite?mode=ro", uri=True)) as db:
                row = db.execute(query).fetchone()
        else:
            import psycopg

            with psycopg.connect(place.ledger, connect_timeout=1) as server:
                row = server.execute(query.encode()).fetchone()
        if row is not None:
            return f"{row[0]} {row[1]} {row[2]}/{row[3]}"
    return "unknown"


def _set_clock(skew_s: float) -> None:
    """All that this process reads of its host's wall clock is off by that much."""
    real_s, real_ns = time.time, time.time_ns
    time.time = lambda: real_s() + skew_s
    time.time_ns = lambda: real_ns() + int(skew_s * 1e9)


class _Left(Exception):
    """A person took the device away in the middle of a task."""


class _Journalled(Connection):
    """A connection whose receipts, and whose last words on an update, are written down."""

    def __init__(self, address: str, journal: Path) -> None:
        super().__init__(address, patience_s=60.0)
        self._journal = journal

    def send(self, contribution: Contribution, payload: bytes, *more: Any) -> Receipt:
        try:
            receipt = super().send(contribution, payload, *more)
        except Refused as error:
            if after(error) in (Action.NEXT, Action.DROP):
                key = Receipt(
                    contribution.run,
                    contribution.round,
                    contribution.attempt,
                    contribution.device,
                    contribution.digest,
                )
                invariants.note(self._journal, key, refused=error.reason)
            raise
        invariants.note(self._journal, receipt)
        return receipt


class _NoEngine(Session):
    def work(self, run: RunSpec, layout: Layout) -> Any:
        return SimpleNamespace(run=run)


def client(stage: Stage, scene: Scene, number: int, incarnation: int) -> None:
    quicken()
    if number <= scene.uploaders:
        vars(uploads).update(CHUNK_BYTES=1024, PART_BYTES=300, LONGEST_PART_BYTES=300, CALL_BYTES=600)
    chance = Random(f"edgetune client {scene.seed} {number} {incarnation}")
    participate._compute = lambda *given: _computed(chance, stage.calm, *given)
    session = _NoEngine(Device(stage.folder), [])
    link = FlakyLink(stage.addresses, stage.calm, stage.log, draws.weather(scene, number, incarnation), chance)
    state = DeviceState(stage.folder / f"device-{number}", f"d{number}")
    with _Journalled(link.address, stage.folder / f"journal-{number}") as connection:
        while True:
            try:
                participate.participate(connection, session, state, (scene.run.name,), False, lambda *told: None)
                return
            except _Left:
                continue


def _computed(
    chance: Random, calm: Path, connection: Connection, state: DeviceState, work: Any, task: Task, tell: Any
) -> Pending:
    """Fetch and check the release, take a moment, now and then leave or miss the deadline; then the update, the same for each
    round."""
    fetched = connection.release(task.run, 4 * LAYOUT.size, task.release_version)
    assert fetched.release.digest == task.release_digest and spec.bytes_digest(fetched.data) == fetched.release.adapter
    state.saw(fetched.release)
    time.sleep(chance.uniform(0.0, 0.04))
    if work.run.cohort.deadline_s == draws.SHORT_S and not calm.exists() and chance.random() < 0.25:
        time.sleep(1.2 * draws.SHORT_S)
    if chance.random() < 0.05:
        raise _Left
    payload = _payload(work.run, state.device, task) if task.kind == "train" else b""
    digest = spec.bytes_digest(payload) if payload else ""
    named = (state.device, task.run, task.round, task.attempt, digest, len(payload), 1, work.run.base.digest)
    metrics = Metrics(loss_before=1.0, held_out_tokens=1)
    return Pending(Contribution(*named, task.release_digest, metrics), payload, {}, task.release_version)


def _payload(run: RunSpec, device: str, task: Task) -> bytes:
    seed = int.from_bytes(hashlib.sha256(f"{device} {task.round} {task.release_version}".encode()).digest()[:8])
    vector = np.random.default_rng(seed).uniform(-1, 1, LAYOUT.size).astype(np.float32)
    chain = run.chain()
    assert chain is not None
    return bytes(chain.encode(Delta(LAYOUT, vector), chain.init(LAYOUT))[0])


def judge(stage: Stage, scene: Scene, ended: bool) -> None:
    """Leaves `judged.json`: what is wrong, and how much was done."""
    one_clock = not (scene.skewed and scene.lane == "sqlite")

    async def judged() -> dict[str, Any]:
        store = stage.place.open(create=False)
        noted = invariants.receipts(stage.journals())
        refused = invariants.refusals(stage.journals())
        found = await invariants.violations(store, noted, refused, ended=ended, one_clock=one_clock)
        status = await store.ledger.status(scene.run.name)
        await store.ledger.close()
        found += [f"an honest device was refused: {reason}" for reason in sorted(DISHONEST & set(status.refused))]
        return {"violations": found, "rounds": len(status.releases) - 1, "receipts": len(set(noted))}

    (stage.folder / "judged.json").write_text(json.dumps(asyncio.run(judged())))
