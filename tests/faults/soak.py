"""Many unsteady devices, two replicas, and a rolling kill -9, for minutes: what does a federation lose? Nothing, or this says.

    python -m tests.faults.soak [--clients N] [--seconds S] [--lane postgresql|embedded] [--kill-every S] [--json FILE]

The devices are `tests/faults/crowd.py`'s, some of which vanish and some of which send what nobody should take. Afterwards the
store is checked against the receipts that the devices kept (`tests/faults/invariants.py`), and `edgetune run verify` makes
every release again. Exits 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coordinator.stores import Place
from edge_client.transport import Connection
from tests import servers
from tests.faults import invariants
from tests.faults.crowd import RUN
from tests.processes import CoordinatorProcess, edgetune, environment, output, write_toy_spec

IN_A_PROCESS = 50
LOOK_S = 0.5
END_S = 240.0
MOST_P99_S = 1.0
"""What a commit may take, in a hundred but one, on two cores."""


@dataclasses.dataclass(frozen=True)
class Options:
    """`kill_every_s` 0: nobody is killed. A device takes a sixth of `train_s` up to all of it to train; of the
    updates a share of `corrupt` is damaged."""

    clients: int = 200
    seconds: float = 240.0
    lane: str = "postgresql"
    kill_every_s: float = 10.0
    replicas: int = 2
    seed: int = 1
    train_s: float = 6.0
    corrupt: float = 0.02


@dataclasses.dataclass(frozen=True)
class Result:
    """`rss_mib_a_minute`: the slope of what a replica holds when it has lived as long as its fellows did."""

    options: Options
    seconds: float
    kills: int
    releases: int
    abandoned: int
    updates: int
    receipts: int
    counted: int
    vanished: int
    corrupted: dict[str, int]
    refused: dict[str, int]
    commit_p50_s: float
    commit_p99_s: float
    send_p99_s: float
    rss_mib: float
    rss_mib_a_minute: float
    wrong: list[str]
    devices: dict[str, int]


LANES: dict[str, Callable[[Path], contextlib.AbstractContextManager[Place]]] = {}


def lane(name: str) -> Callable[[Callable[[Path], Iterator[Place]]], None]:
    def named(place: Callable[[Path], Iterator[Place]]) -> None:
        LANES[name] = contextlib.contextmanager(place)

    return named


@lane("embedded")
def _embedded(folder: Path) -> Iterator[Place]:
    yield Place.of(str(folder / "store"), None)


@lane("postgresql")
def _postgresql(folder: Path) -> Iterator[Place]:
    with servers.postgres() as database, servers.seaweedfs() as bucket, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment.items():
            patch.setenv(name, value)
        yield Place.of(database.fresh(), bucket.fresh())


def soak(options: Options, folder: Path, tell: Callable[[str], None] = lambda line: None) -> Result:
    """One whole soak in `folder`, which must be empty."""
    with LANES[options.lane](folder) as place:
        more = ("--blobs", place.blobs, "--replicas", str(options.replicas))
        with CoordinatorProcess(place.ledger, "127.0.0.1:0", *more, log=folder / "coordinator.log") as together:
            _create(together.address, folder, options.clients)
            began, crowd = time.monotonic(), _crowd(together.address, folder, options)
            watched = _Watched(together, options, tell)
            watched.until(began + options.seconds)
            with Connection(together.address) as connection:
                connection.control(RUN, "stop", "the soak is over")
            told = [json.loads(_ended(one)) for one in crowd]
            with Connection(together.address) as connection:
                refused = connection.status(RUN).refused
        return _result(options, place, folder, watched, told, refused, time.monotonic() - began)


def _create(address: str, folder: Path, clients: int) -> None:
    goal = max(1, round(0.8 * clients))
    text = write_toy_spec(
        folder / "toy.toml",
        name=RUN, rounds=100_000, goal=goal, minimum=goal // 2, deadline_s=30.0, local_steps=1,
    ).read_text()  # fmt: skip
    spec = folder / "soak.toml"
    spec.write_text(text.replace("[cohort]\n", f"[cohort]\nover_selection = {clients / goal}\n"))
    made = edgetune("run", "create", spec, "--coordinator", address)
    assert made.returncode == 0, made.stderr


def _crowd(address: str, folder: Path, options: Options) -> list[subprocess.Popen[str]]:
    line = [sys.executable, "-m", "tests.faults.crowd", address, str(folder)]
    firsts = range(0, options.clients, IN_A_PROCESS)
    counts = [min(IN_A_PROCESS, options.clients - first) for first in firsts]
    return [
        subprocess.Popen(
            [*line, str(first), str(count), str(options.seed), str(options.train_s), str(options.corrupt)],
            stdout=subprocess.PIPE,
            stderr=(folder / f"crowd-{first}.log").open("w"),
            text=True,
            env=environment(),
        )
        for first, count in zip(firsts, counts, strict=True)
    ]


def _ended(crowd: subprocess.Popen[str]) -> str:
    out, said = output(crowd, END_S)
    assert crowd.returncode == 0, f"devices did not end: {said}"
    return out


class _Watched:
    """Kills replicas in turn, and looks at what they hold."""

    def __init__(self, together: CoordinatorProcess, options: Options, tell: Callable[[str], None]) -> None:
        self._together, self._options, self._tell = together, options, tell
        self._held: dict[int, tuple[float, float]] = {}
        """By process: when it was last looked at, and MiB."""
        self.kills = 0

    def until(self, end: float) -> None:
        began = due = time.monotonic()
        with Connection(self._together.address) as connection:
            while (now := time.monotonic()) < end:
                self._look(now - began)
                if self._options.kill_every_s and now - due >= self._options.kill_every_s:
                    due = now
                    self._kill(1 + self.kills % self._options.replicas)
                status = connection.status(RUN)
                self._tell(
                    f"{now - began:5.0f} s  round {status.round}.{status.attempt}  {status.accepted} of {status.goal}"
                    f"  kills {self.kills}"
                )
                time.sleep(LOOK_S)

    def _look(self, second: float) -> None:
        for pid in self._together.replicas.values():
            with contextlib.suppress(OSError):
                self._held[pid] = (second, _rss_mib(pid))

    def _kill(self, replica: int) -> None:
        os.kill(self._together.replicas[replica], signal.SIGKILL)
        self._together.event("replica_ended")
        self._together.event("replica_started")
        self.kills += 1

    @property
    def rss_mib(self) -> float:
        return max(mib for _, mib in self._held.values())

    @property
    def rss_mib_a_minute(self) -> float:
        """Over processes that lived a whole life, so not the first nor those that live still."""
        whole = list(self._held.values())[self._options.replicas : -self._options.replicas]
        if len(whole) < 3:
            return 0.0
        return 60 * statistics.linear_regression(*zip(*whole, strict=True)).slope


def _rss_mib(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / (1 << 20)


def _result(
    options: Options,
    place: Place,
    folder: Path,
    watched: _Watched,
    told: list[dict[str, Any]],
    refused: dict[str, int],
    seconds: float,
) -> Result:
    journals = list(folder.glob("*.receipts"))
    wrong = asyncio.run(invariants.violations_at(place, journals, ended=True))
    verified = edgetune("run", "verify", RUN, "--store", place.ledger, "--blobs", place.blobs, "--json", timeout_s=600)
    if verified.returncode:
        wrong.append(f"run verify: {verified.stdout[-500:]}{verified.stderr}")
    wrong += [line for one in told for line in one["wrong"]]
    counts = sum((collections.Counter(one["counts"]) for one in told), collections.Counter[str]())
    counted, abandoned = asyncio.run(_counted(place))
    commits, sends = ([s for one in told for s in one[name]] for name in ("commits", "sends"))
    return Result(
        options=options,
        seconds=seconds,
        kills=watched.kills,
        releases=len(json.loads(verified.stdout)["releases"]) - 1,
        abandoned=abandoned,
        updates=counts["updates"],
        receipts=len(invariants.receipts(journals)),
        counted=counted,
        vanished=sum(count for what, count in counts.items() if what.startswith("vanished")),
        corrupted=dict(sum((collections.Counter(one["refused"]) for one in told), collections.Counter[str]())),
        refused=refused,
        commit_p50_s=_quantile(commits, 50),
        commit_p99_s=_quantile(commits, 99),
        send_p99_s=_quantile(sends, 99),
        rss_mib=watched.rss_mib,
        rss_mib_a_minute=watched.rss_mib_a_minute,
        wrong=wrong,
        devices=dict(counts),
    )


async def _counted(place: Place) -> tuple[int, int]:
    """Updates that releases are made of, and attempts that were given up."""
    store = place.open(create=False)
    newest = (await store.ledger.release(RUN, None)).version
    made = [await store.ledger.release(RUN, version) for version in range(1, newest + 1)]
    abandoned = (await store.ledger.rounds_by_state()).get("abandoned", 0)
    await store.ledger.close()
    return sum(len(release.contributions) for release in made), abandoned


def _quantile(values: list[float], percent: int) -> float:
    return statistics.quantiles(values, n=100)[percent - 1]


def table(result: Result) -> str:
    """For people."""
    o = result.options
    rows = {
        "store": o.lane,
        "devices, replicas": f"{o.clients}, {o.replicas}",
        "seconds, kills": f"{result.seconds:.0f}, {result.kills}",
        "releases, attempts given up": f"{result.releases}, {result.abandoned}",
        "updates made, receipts, counted in releases": f"{result.updates}, {result.receipts}, {result.counted}",
        "devices that vanished in a task": str(result.vanished),
        **{f"refused, {kind.partition(':')[0]}": f"{count} by{kind.partition(':')[2]}"
           for kind, count in sorted(result.corrupted.items())},
        "a commit, median and p99": f"{result.commit_p50_s:.3f} s, {result.commit_p99_s:.3f} s",
        "first byte to receipt, kills included, p99": f"{result.send_p99_s:.3f} s",
        "memory of a replica, and its growth": f"{result.rss_mib:.0f} MiB, {result.rss_mib_a_minute:+.2f} MiB/min",
        "wrong": str(len(result.wrong)),
    }  # fmt: skip
    width = max(map(len, rows))
    return "\n".join([f"{name:<{width}}  {value}" for name, value in rows.items()] + result.wrong[:20])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = Options()
    parser.add_argument("--clients", type=int, default=defaults.clients)
    parser.add_argument("--seconds", type=float, default=defaults.seconds)
    parser.add_argument("--lane", choices=sorted(LANES), default=defaults.lane)
    parser.add_argument("--kill-every", type=float, default=defaults.kill_every_s, dest="kill_every_s")
    parser.add_argument("--replicas", type=int, default=defaults.replicas)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--train", type=float, default=defaults.train_s, dest="train_s", metavar="S")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the figures, as one object")
    args = vars(parser.parse_args(arguments))
    written = args.pop("json")

    def tell(line: str) -> None:
        print(f"\r{line}", end="", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        result = soak(Options(**args), Path(folder), tell)
    print(f"\n{table(result)}")
    if written is not None:
        written.write_text(json.dumps(dataclasses.asdict(result), indent=1))
    return 1 if result.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
