"""Random schedules of faults: replicas over one store, clients on links that break, and everything killed in turn.

A schedule follows from its seed (`draws.py`): two or three replica processes, three or four client processes, one of which
sends its updates in parts, and faults: kill -9 at a named step of the store or at an instant, SIGSTOP for longer than
anything waits, a full disk, clocks that are off, requests and answers lost, the database crashed, the bucket's server killed.
When no fault comes any more one healthy replica is left; the run must end, and then `invariants.py` looks. A schedule that
fails says its seed and keeps its folder:

    python -m tests.faults.schedules --store sqlite --seeds 7:8

Schedules wait more than they compute: some are played side by side, each in a fork that forks all others of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from coordinator.stores import Place
from tests import servers
from tests.faults import actors, bugs, draws, forks
from tests.faults.actors import Stage
from tests.faults.draws import Incident, Lane, Life, Scene
from tests.faults.flaky_links import append

STUCK_AFTER_S = 30.0
"""Without a receipt after the last fault, on a machine that has other work too; deadlines are 1.5 s or never come."""
LONGEST_S = 120.0
"""From the last fault to the end, whatever moves: what takes seconds alone may take half a minute beside other work."""
STEP_S = 0.015
RESTART_S = 0.05


@dataclasses.dataclass(frozen=True)
class Servers:
    """What a lane over servers stands on; both None in the embedded lane."""

    database: servers.Postgres | None = None
    bucket: servers.SeaweedFS | None = None

    def place(self, folder: Path) -> Place:
        if self.database is None or self.bucket is None:
            return Place.of(str(folder / "store"), None)
        return Place.of(self.database.fresh(), self.bucket.fresh())

    @contextlib.contextmanager
    def of(self, scene: Scene) -> Iterator[Servers]:
        """For one schedule: a server that crashes in it is no other's."""
        befallen = {incident.kind for incident in scene.incidents}
        with contextlib.ExitStack() as ends:
            crashing = "database" in befallen and self.database
            database = ends.enter_context(servers.postgres(power_may_fail=False)) if crashing else self.database
            bucket = ends.enter_context(servers.seaweedfs()) if "bucket" in befallen else self.bucket
            yield Servers(database, bucket)


@dataclasses.dataclass
class _Process:
    kind: str
    number: int
    incarnation: int
    goes_on_at: float | None = None
    """When it is stopped."""


class Schedule:
    """One schedule, from the first process to the judge's word."""

    def __init__(self, scene: Scene, over: Servers, folder: Path, bug: str | None) -> None:
        self._scene, self._over, self._bug = scene, over, bug
        folder.mkdir(parents=True)
        self._stage = Stage(folder, over.place(folder))
        self._stage.addresses.mkdir()
        self._running: dict[int, _Process] = {}
        self._due: list[tuple[float, str, int]] = []
        """When which replica or client starts again."""
        self._lives = Counter[tuple[str, int]]()
        self._stops = {one.who: one.for_s for one in scene.incidents if one.kind == "stop"}
        self._wrong: list[str] = []
        self._done = set[int]()
        self._began = time.monotonic()

    def play(self) -> dict[str, Any]:
        try:
            self._create()
            for number in range(1, self._scene.replicas + 1):
                self._start("replica", number)
            for number in range(1, self._scene.clients + 1):
                self._start("client", number)
            self._through_faults()
            self._to_the_end()
            return self._outcome()
        finally:
            for pid in self._running:
                os.kill(pid, signal.SIGKILL)
            for pid in self._running:
                os.waitpid(pid, 0)

    def _create(self) -> None:
        if forks.ended(self._fork("create", 0, actors.create, self._stage, self._scene)) != 0:
            raise RuntimeError(f"no run could be created; see {self._stage.folder}/create-0.log")

    def _through_faults(self) -> None:
        incidents = list(self._scene.incidents)
        until = self._began + self._scene.lasts_s
        while time.monotonic() < until and not self._is_in_the_last_round() and not self._is_over():
            while incidents and time.monotonic() - self._began >= incidents[0].at_s:
                self._befall(incidents.pop(0))
            self._turn()

    def _is_in_the_last_round(self) -> bool:
        run = self._scene.run
        noted = sum(journal.read_bytes().count(b"\n") for journal in self._stage.journals())
        return noted >= (run.rounds - 1) * run.cohort.size

    def _to_the_end(self) -> None:
        """One replica without a fault of its own, and every client."""
        self._stage.calm.touch()
        self._end_all("replica")
        self._due = [one for one in self._due if one[1] == "client"]
        self._start("replica", 1, Life())
        moved, noted, give_up = time.monotonic(), 0, time.monotonic() + LONGEST_S
        while not self._is_over() and time.monotonic() < min(moved + STUCK_AFTER_S, give_up):
            self._turn()
            if (now := sum(journal.stat().st_size for journal in self._stage.journals())) != noted:
                moved, noted = time.monotonic(), now
        if not self._is_over():
            self._wrong.append(f"no end comes, and {self._scene.clients - len(self._done)} clients have not ended")
        self._end_all("client")
        self._end_all("replica")

    def _is_over(self) -> bool:
        return len(self._done) == self._scene.clients or bool(self._wrong)

    def _turn(self) -> None:
        time.sleep(STEP_S)
        now = time.monotonic()
        for pid, process in list(self._running.items()):
            if process.goes_on_at is not None and (now >= process.goes_on_at or self._stage.calm.exists()):
                process.goes_on_at = None
                os.kill(pid, signal.SIGCONT)
                _moved(self._stage.aside(process.number), self._stage.address(process.number))
            ended, status = os.waitpid(pid, os.WNOHANG | os.WUNTRACED)
            if ended:
                self._ended(pid, process, status, now)
        for due in [one for one in self._due if one[0] <= now]:
            self._due.remove(due)
            self._start(*due[1:])

    def _ended(self, pid: int, process: _Process, status: int, now: float) -> None:
        """Or stopped at a step of its own."""
        if os.WIFSTOPPED(status):
            process.goes_on_at = process.goes_on_at or now + self._stops.get(process.number, self._scene.stopped_s)
            _moved(self._stage.address(process.number), self._stage.aside(process.number))
            return
        del self._running[pid]
        code = os.waitstatus_to_exitcode(status)
        if process.kind == "replica":
            self._stage.address(process.number).unlink(missing_ok=True)
            self._stage.aside(process.number).unlink(missing_ok=True)
        if process.kind == "client" and code == 0:
            self._done.add(process.number)
            return
        if code != -signal.SIGKILL:
            self._gave_up(process, code)
        self._due.append((now + RESTART_S, process.kind, process.number))

    def _gave_up(self, process: _Process, code: int) -> None:
        """A client never may; a replica may not start while its store is not there."""
        said = (self._stage.folder / f"{process.kind}-{process.number}.log").read_text().strip().splitlines()
        last = said[-1] if said else "nothing"
        if process.kind == "client" or not (code == 3 and last.startswith("MachineError") and self._over.database):
            self._wrong.append(f"{process.kind} {process.number} gave up ({code}): {last}")

    def _befall(self, incident: Incident) -> None:
        append(self._stage.log, {"what": incident.kind})
        match incident.kind:
            case "kill" | "kill client":
                self._kill("client" if incident.kind == "kill client" else "replica", incident)
            case "stop":
                for pid, process in self._running.items():
                    if process.kind == "replica" and process.number == incident.who:
                        process.goes_on_at = time.monotonic() + incident.for_s
                        os.kill(pid, signal.SIGSTOP)
            case "blackout":
                self._end_all("replica")
                self._judge(ended=False)
                self._due += [
                    (time.monotonic() + incident.for_s, "replica", number + 1) for number in range(self._scene.replicas)
                ]
            case "database" if self._over.database:
                self._over.database.crash()
            case "bucket" if self._over.bucket:
                self._over.bucket.crash()

    def _kill(self, kind: str, incident: Incident) -> None:
        for pid, process in self._running.items():
            if (process.kind, process.number) == (kind, incident.who):
                os.kill(pid, signal.SIGKILL)

    def _end_all(self, kind: str) -> None:
        for pid, process in list(self._running.items()):
            if process.kind == kind:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                del self._running[pid]
        if kind == "replica":
            self._due = [one for one in self._due if one[1] != kind]
            for address in (*self._stage.addresses.iterdir(), *self._stage.folder.glob("stopped-*")):
                address.unlink()

    def _start(self, kind: str, number: int, life: Life | None = None) -> None:
        incarnation = self._lives[kind, number]
        self._lives[kind, number] += 1
        if kind == "client":
            pid = self._fork(kind, number, actors.client, self._stage, self._scene, number, incarnation)
        else:
            lived = life if life is not None else draws.life(self._scene, number, incarnation)
            pid = self._fork(kind, number, actors.replica, self._stage, number, lived, self._bug)
        self._running[pid] = _Process(kind, number, incarnation)

    def _fork(self, kind: str, number: int, work: Any, *given: Any) -> int:
        return forks.alone(work, *given, log=self._stage.folder / f"{kind}-{number}.log")

    def _judge(self, ended: bool) -> dict[str, Any]:
        if forks.ended(self._fork("judge", 0, actors.judge, self._stage, self._scene, ended)) != 0:
            said = (self._stage.folder / "judge-0.log").read_text().strip().splitlines()
            self._wrong.append(f"the store cannot be judged: {said[-1] if said else ''}")
            return {"rounds": 0, "receipts": 0}
        judged: dict[str, Any] = json.loads((self._stage.folder / "judged.json").read_text())
        self._wrong += judged["violations"]
        return judged

    def _outcome(self) -> dict[str, Any]:
        judged = self._judge(ended=True)
        lines = (
            [json.loads(line) for line in self._stage.log.read_text().splitlines()] if self._stage.log.exists() else []
        )
        faults = Counter(line["what"] for line in lines)
        if self._scene.skewed:
            faults["clocks off"] += 1
        return {
            "seed": self._scene.seed,
            "store": self._scene.lane,
            "bug": self._bug,
            "violations": self._wrong,
            "rounds": judged["rounds"],
            "receipts": judged["receipts"],
            "faults": dict(faults),
            "pairs": sorted({f"{line['step']} | {line['state']}" for line in lines if "step" in line}),
            "seconds": round(time.monotonic() - self._began, 2),
        }


def _moved(address: Path, to: Path) -> None:
    """What is stopped before it has an address, has none."""
    with contextlib.suppress(FileNotFoundError):
        address.replace(to)


def played(seed: int, over: Servers, lane: Lane, kept: Path, bug: str | None = None) -> dict[str, Any]:
    """What became of a schedule. Its folder goes to `kept` if anything is wrong, unless a bug was on."""
    scene = draws.scene(seed, lane)
    with tempfile.TemporaryDirectory(dir=servers.IN_MEMORY) as folder, over.of(scene) as own:
        outcome = Schedule(scene, own, Path(folder) / "own", bug).play()
        if outcome["violations"] and not bug:
            place = kept / f"{lane}-{seed}"
            shutil.rmtree(place, ignore_errors=True)
            shutil.move(Path(folder) / "own", place)
            outcome["folder"] = str(place)
    return outcome


@contextlib.contextmanager
def standing(lane: Lane) -> Iterator[Servers]:
    """The servers of a lane, for as long as it takes."""
    if lane == "sqlite":
        yield Servers()
        return
    with servers.postgres(power_may_fail=False) as database, servers.seaweedfs() as bucket:
        os.environ |= bucket.environment
        yield Servers(database, bucket)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n\n")[0])
    parser.add_argument("--store", choices=get_args(Lane), required=True)
    parser.add_argument("--seeds", default="0:30", help="FIRST:LAST+1, or a list")
    parser.add_argument("--bug", choices=sorted(bugs.BUGS), help="a mistake that every replica makes")
    parser.add_argument("--first", action="store_true", help="stop at the first schedule that fails")
    parser.add_argument("--abreast", type=int, default=1, help="how many are played at a time")
    parser.add_argument("--folder", type=Path, default=Path("faults-out"), help="where what failed is kept")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes and servers end with this one
    os.environ |= {"GRPC_VERBOSITY": "NONE", "GRPC_ENABLE_FORK_SUPPORT": "0", "OMP_NUM_THREADS": "1"}
    forks.warm_up(draws.scene(0, "sqlite").run, draws.LAYOUT)
    wrong = 0
    with standing(args.store) as over:
        play = functools.partial(played, over=over, lane=args.store, kept=args.folder, bug=args.bug)
        for outcome in forks.side_by_side(play, _seeds(args.seeds), args.abreast):
            print(json.dumps(outcome), flush=True)
            wrong += bool(outcome["violations"])
            if wrong and args.first:
                break
    sys.exit(1 if wrong else 0)


def _seeds(text: str) -> list[int]:
    first, is_range, last = text.partition(":")
    return list(range(int(first), int(last))) if is_range else [int(one) for one in text.split(",")]


if __name__ == "__main__":
    main()
