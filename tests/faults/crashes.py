"""One crash at a time, at every named step of a store, embedded or PostgreSQL with a bucket: a child process runs a whole
small federation against the coordinator's own code, kill -9 ends it at the step, the store is checked as it lies, another
child goes on from it, and the store is checked again.

A crash is a step of `steps.py` and which of its arrivals. Run as a program, so that children are forked from a process
without threads:

    python -m tests.faults.crashes FOLDER [--bug BUG] [--servers POSTGRES_URL S3_ADDRESS]
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import hashlib
import json
import os
import secrets
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from coordinator import closing, publish
from coordinator.bell import Bell
from coordinator.core import Core
from coordinator.meter import Meter, Times
from coordinator.service import Federation
from coordinator.stores import Place, Store
from protos.v1 import federation_pb2 as pb
from tests.faults import bugs, forks, invariants
from tests.faults.steps import Steps, instrument
from tests.servers import s3_url, schema_url
from wire import run_spec, spec
from wire.delta import Delta, Layout, Tensor
from wire.errors import EdgetuneError
from wire.messages import Contribution, Metrics, Receipt, Task

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


def dying_at(crash: Crash | None) -> Steps:
    """Steps of which the one that `crash` names is the last thing this process does."""

    def told(step: str, arrival: int) -> bool:
        if crash == Crash(step, arrival):
            os.kill(os.getpid(), signal.SIGKILL)
        return False

    return Steps(told)


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
                    invariants.note(journal, await _sent(served, contribution, payload, in_parts=device == DEVICES[0]))
            await closing._close_due(store, compute, Bell(), Times(), None)
    await store.ledger.close()


async def _sent(served: Federation, mine: Contribution, payload: bytes, in_parts: bool) -> Receipt:
    """As a device sends it: at once, or two parts and the commit, going on where it was."""
    if not payload or not in_parts:
        return await served._receive(mine, payload)
    state = await served._create_upload(mine)
    while state.offset < len(payload):
        data = payload[state.offset : state.offset + len(payload) // 2]
        digest = spec.bytes_digest(data)
        part = pb.UploadPart(upload=state.upload, device=mine.device, offset=state.offset, digest=digest, data=data)
        state.offset = await served._core.uploads.append(part)
    return await served._receive(mine, None)


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


@dataclasses.dataclass(frozen=True)
class Servers:
    """PostgreSQL at a URL, and an S3 server at an address: every crash has a schema and a prefix of its own."""

    postgres: str
    s3: str

    def fresh(self) -> Place:
        import psycopg

        name = f"c{secrets.token_hex(8)}"
        with psycopg.connect(self.postgres, autocommit=True) as db:
            db.execute(f"CREATE SCHEMA {name}".encode())
        return Place.of(schema_url(self.postgres, name), s3_url(self.s3, name))


@dataclasses.dataclass(frozen=True)
class Sweep:
    """`servers` None: the embedded store. A `bug` is on in every process."""

    folder: Path
    servers: Servers | None = None
    bug: str | None = None

    def attempt(self, crash: Crash | None) -> list[str]:
        """One crash in a fresh store, and all that is wrong after it; steps of a run without a crash lie in `steps.json`."""
        folder = self.folder_of(crash)
        folder.mkdir(parents=True)
        place = self.servers.fresh() if self.servers else Place.of(str(folder / "store"), None)
        died = forks.ended(forks.alone(self._crashing, place, folder, crash))
        if died != (0 if crash is None else -signal.SIGKILL):
            return [f"the step was not reached, or something else went wrong first: exit {died}"]
        if forks.ended(forks.alone(self.going_on, place, folder)) != 0:
            return ["checking failed"]
        found: list[str] = json.loads((folder / "faults.json").read_text())
        return found

    def folder_of(self, crash: Crash | None) -> Path:
        return self.folder / (f"{crash.step} {crash.arrival}" if crash else "none")

    def _crashing(self, place: Place, folder: Path, crash: Crash | None) -> None:
        steps = self._prepare(crash)
        asyncio.run(federation(place, folder / "journal"))
        (folder / "steps.json").write_text(json.dumps(steps.arrivals))

    def going_on(self, place: Place, folder: Path) -> None:
        self._prepare(None)
        journal = [folder / "journal"]
        found = asyncio.run(invariants.violations_at(place, journal, ended=False))
        try:
            asyncio.run(federation(place, journal[0]))
            found += asyncio.run(invariants.violations_at(place, journal, ended=True))
        except EdgetuneError as error:
            found.append(f"a coordinator cannot go on: {error}")
        (folder / "faults.json").write_text(json.dumps(found))

    def _prepare(self, crash: Crash | None) -> Steps:
        instrument(steps := dying_at(crash))
        bugs.BUGS[self.bug].plant() if self.bug else None
        return steps

    def crashes(self) -> list[Crash]:
        """Every arrival at every step that a run without a crash reaches. Statements of one transaction are all undone
        alike: of each kind the first will do."""
        if found := self.attempt(None):
            raise AssertionError(f"wrong without any crash: {found}")
        arrivals: dict[str, int] = json.loads((self.folder_of(None) / "steps.json").read_text())
        undone = {step for step in arrivals if step.startswith(("INSERT", "UPDATE", "DELETE"))}
        every = [Crash(step, n) for step, last in arrivals.items() for n in range(1, 2 if step in undone else last + 1)]
        return [crash for crash in every if self.bug is None or crash.step == bugs.BUGS[self.bug].step]

    def run(self, abreast: int = 1) -> Iterator[dict[str, Any]]:
        """What each crash did; with a seeded bug, of its step, until the first violation."""
        every = self.crashes()
        for crash, found in zip(every, forks.side_by_side(self.attempt, every, abreast), strict=True):
            yield {**dataclasses.asdict(crash), "faults": found}
            if self.bug and found:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bug", choices=sorted(bugs.BUGS))
    parser.add_argument("--servers", nargs=2, metavar=("POSTGRES_URL", "S3_ADDRESS"))
    parser.add_argument("--abreast", type=int, default=1, help="how many crashes at a time")
    args = parser.parse_args()
    forks.warm_up(RUN, LAYOUT)
    sweep = Sweep(args.folder, Servers(*args.servers) if args.servers else None, args.bug)
    for result in sweep.run(args.abreast):
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
