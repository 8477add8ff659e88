"""What a coordinator costs beside a gRPC server that takes the same calls with the same bytes and does nothing (`bare`).

Cases are visited in turn, several times, in one run; CPU time is that of the server's processes alone. `durable` is the embedded
store on a disk, `not durable` the same on a file system in memory, where a sync costs nothing: their difference is durability.

    python -m benchmarks.coordinator_throughput [--only NAME …] [--repeats N] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc

from benchmarks import load
from benchmarks.load import BareProcess, Took, Update, at_once, made, send, timed, update, updates
from coordinator.aggregators.mean import FixedPointSum
from edge_client.transport import Connection
from protos.v1 import federation_pb2 as pb
from protos.v1 import federation_pb2_grpc as pb_grpc
from tests.processes import CoordinatorProcess
from wire.delta import Layout, Tensor
from wire.run_spec import RunSpec

IN_MEMORY = Path("/dev/shm")
CODED, LARGE, SMALL, MIDDLE = 2_600_000, 19_537_920, 20_480, 1_200_000
"""Bytes: a coded update, rank 16 on SmolLM2-135M in float32, a toy's, and one that is just too long for one call."""
AT_ONCE, INGESTED, OF_A_ROUND, STALLED, HONEST = 8, 32, 32, 200, 20
VECTOR = LARGE // 4
SETS = 12
"""Updates in rotation: 234 MB, more than any cache holds."""
Server = BareProcess | CoordinatorProcess


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measurement beside its bound: at most it, or at least it."""

    what: str
    value: float
    unit: str
    bound: float | None = None
    at_least: bool = False

    @property
    def good(self) -> bool:
        return self.bound is None or (self.value >= self.bound if self.at_least else self.value <= self.bound)

    def __str__(self) -> str:
        bound = "" if self.bound is None else f"  ({'at least' if self.at_least else 'at most'} {self.bound:g})"
        return f"{'' if self.good else 'MISSED '}{self.what}: {self.value:.3g} {self.unit}{bound}"


def ingest(repeats: int, folder: Path) -> Iterator[Figure]:
    """2.6 MB updates, eight at a time; beside `bare` also `least`, which hashes them once and writes and syncs them once."""
    with (
        BareProcess() as bare,
        BareProcess(folder) as least,
        CoordinatorProcess(folder / "durable") as durable,
        tempfile.TemporaryDirectory(dir=IN_MEMORY) as memory,
        CoordinatorProcess(Path(memory) / "store") as volatile,
    ):
        servers: dict[str, Server] = {"bare": bare, "least": least, "not durable": volatile, "durable": durable}
        took: dict[str, list[Took]] = {name: [] for name in servers}
        for turn, (name, server) in itertools.product(range(repeats), servers.items()):
            took[name].append(_sent(server, CODED, INGESTED, f"ingest-{turn}", AT_ONCE))
    cpu = {name: min(one.server_s for one in found) / INGESTED for name, found in took.items()}
    rate = {name: INGESTED * CODED / 1e6 / min(one.wall_s for one in found) for name, found in took.items()}
    yield Figure("2.6 MB update, bare: server CPU", 1e3 * cpu["bare"], "ms")
    yield Figure("2.6 MB updates, bare", rate["bare"], "MB/s")
    yield Figure("2.6 MB update, hashed and written once: server CPU against bare", cpu["least"] / cpu["bare"], "x")
    yield Figure("2.6 MB updates, hashed and written once: MB/s against bare", rate["least"] / rate["bare"], "x")
    for name in ("not durable", "durable"):
        yield Figure(f"2.6 MB update, {name}: server CPU", 1e3 * cpu[name], "ms")
        yield Figure(f"2.6 MB update, {name}: server CPU against bare", cpu[name] / cpu["bare"], "x", 1.25)
        yield Figure(f"2.6 MB updates, {name}: MB/s against bare", rate[name] / rate["bare"], "x", 0.85, at_least=True)


def _sent(server: Server, size: int, devices: int, name: str, most: int = 64) -> Took:
    """Updates of `devices`, `most` at a time, until the last receipt; tasks and payloads are made before, and the round stays
    open."""
    ready = _ready(server, *made(name, size, devices + 1), devices)
    with timed(server.process.pid) as took:
        at_once(lambda one: send(server.address, one), ready, most)
    return took()


def _ready(server: Server, run: RunSpec, layout: Layout, devices: int) -> list[Update]:
    if isinstance(server, BareProcess):
        return [update(run, layout, f"d-{n}", n, "c" * 64) for n in range(devices)]
    return updates(server.address, run, layout, devices)


def fold(repeats: int, folder: Path) -> Iterator[Figure]:
    """Into int64 fixed point, against a triad a = b + s * c: bytes that either moves, by time of one thread."""
    chance = np.random.default_rng(1)
    vectors = [chance.normal(size=VECTOR).astype(np.float32) * np.float32(1e-3) for _ in range(SETS)]
    total, out = FixedPointSum(Layout((Tensor("v", (VECTOR,)),))), np.zeros(VECTOR, np.float32)
    triad = _triad()
    triads, folds = [], []
    for n in range(SETS * repeats):
        one, other = vectors[n % SETS], vectors[(n + 1) % SETS]
        triads.append(_thread_s(lambda: triad(out, one, other)))  # noqa: B023  # called at once
        folds.append(_thread_s(lambda: total.add(one, 3)))  # noqa: B023
    triad_gb, fold_gb = (moved * VECTOR / 1e9 / statistics.median(s) for moved, s in ((12, triads), (20, folds)))
    yield Figure("triad (numba)", triad_gb, "GB/s")
    yield Figure("fold of 4.88 M parameters", 1e3 * statistics.median(folds), "ms")
    yield Figure("fold against triad, bytes a second", fold_gb / triad_gb, "x", 0.5, at_least=True)


def _triad() -> Callable[[Any, Any, Any], None]:
    import numba

    def kernel(a: Any, b: Any, c: Any) -> None:
        for i in range(a.size):
            a[i] = b[i] + np.float32(3) * c[i]

    compiled: Callable[[Any, Any, Any], None] = numba.njit(kernel)
    compiled(*np.zeros((3, 8), np.float32))
    return compiled


def _thread_s(work: Callable[[], None]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


def large_round(repeats: int, folder: Path) -> Iterator[Figure]:
    """A round of 32 float32 updates of 19.5 MB, from the first byte to the release."""
    with BareProcess() as bare, BareProcess(folder) as least, CoordinatorProcess(folder / "large") as coordinator:
        receiving, keeping = (
            min(_sent(one, LARGE, OF_A_ROUND, f"large-{n}").server_s for n in range(min(repeats, 2)))
            for one in (bare, least)
        )
        rounds = [_round(coordinator, f"large-{n}") for n in range(min(repeats, 3))]
    yield Figure("32 updates of 19.5 MB, bare: server CPU", receiving, "s")
    yield Figure("the same, hashed and written once: server CPU", keeping, "s")
    yield Figure("a round of 32 updates of 19.5 MB: server CPU", min(r.server_s for r in rounds), "s", 3)
    yield Figure("the same: seconds", min(r.wall_s for r in rounds), "s")


def _round(coordinator: CoordinatorProcess, name: str) -> Took:
    run, layout = made(name, LARGE, OF_A_ROUND)
    ready = updates(coordinator.address, run, layout, OF_A_ROUND)
    with timed(coordinator.process.pid) as took:
        at_once(lambda one: send(coordinator.address, one), ready)
        with Connection(coordinator.address) as connection:
            while len(connection.status(name).releases) < 2:
                time.sleep(0.05)
    return took()


def replicas(repeats: int, folder: Path) -> Iterator[Figure]:
    """20 KB updates, one call each. Load and servers share the cores, so what two replicas give is reckoned by CPU: updates a
    server-CPU-second with two against one, times two: true where each has a core and the ledger's lock is not the bound."""
    with (
        CoordinatorProcess(folder / "one") as one,
        CoordinatorProcess(folder / "two", "127.0.0.1:0", "--replicas", "2") as two,
    ):
        servers = {"one": one, "two": two}
        took: dict[str, list[Took]] = {name: [] for name in servers}
        for turn, (name, server) in itertools.product(range(repeats), servers.items()):
            took[name].append(_sent(server, SMALL, 256, f"small-{turn}"))
    rate = {name: 256 / min(t.wall_s for t in found) for name, found in took.items()}
    work = {name: 256 / statistics.median(t.server_s for t in found) for name, found in took.items()}
    shared = statistics.median(t.load_s / t.wall_s for found in took.values() for t in found)
    yield Figure("20 KB updates, one replica", rate["one"], "a second")
    yield Figure("20 KB updates, two replicas on the same cores", rate["two"], "a second")
    yield Figure("cores that the load took meanwhile", shared, "")
    yield Figure("20 KB updates a server-CPU-second, one replica", work["one"], "")
    yield Figure("20 KB updates a server-CPU-second, two replicas", work["two"], "")
    yield Figure("two replicas against one, a core each", 2 * work["two"] / work["one"], "x", 1.6, at_least=True)


def memory(repeats: int, folder: Path) -> Iterator[Figure]:
    """A server's peak after a round of 20 KB updates from devices that all keep their connections."""
    for name in ("bare", "coordinator"):
        few, many = (_peak_mb(name, folder / f"memory-{devices}", devices) for devices in (8, 1000))
        yield Figure(f"peak memory of the {name}, 8 clients", few, "MB")
        yield Figure(f"peak memory of the {name}, 1,000 clients", many, "MB")
        bound = 1.2 if name == "coordinator" else None
        yield Figure(f"peak memory of the {name}, 1,000 clients against 8", many / few, "x", bound)


def _peak_mb(name: str, store: Path, devices: int) -> float:
    with BareProcess() if name == "bare" else CoordinatorProcess(store) as server, contextlib.ExitStack() as kept:
        ready = _ready(server, *made("memory", SMALL, devices), devices)
        connections = [kept.enter_context(Connection(server.address)) for _ in ready]
        at_once(lambda n: connections[n].send(ready[n].contribution, ready[n].payload), range(devices))
        return load.peak_mb(server.process.pid)


def stalled(repeats: int, folder: Path) -> Iterator[Figure]:
    """Twenty honest devices, four at a time, alone and beside 200 uploads of which not a byte comes."""
    alone, beside, healthy = [], [], []
    with CoordinatorProcess(folder / "stalled") as coordinator:
        for turn in range(repeats):
            alone.append(_slowest(coordinator, f"alone-{turn}"))
            with _Stalling(coordinator.address) as others:
                beside.append(_slowest(coordinator, f"beside-{turn}"))
                healthy.append(others.health_s())
    yield Figure("slowest of 20 honest uploads, alone", 1e3 * statistics.median(alone), "ms")
    yield Figure("slowest of 20 honest uploads beside 200 stalled", 1e3 * statistics.median(beside), "ms")
    yield Figure("beside against alone", statistics.median(beside) / statistics.median(alone), "x", 2)
    yield Figure("slowest answer to a health check meanwhile", 1e3 * max(healthy), "ms", 1000)


def _slowest(coordinator: CoordinatorProcess, name: str) -> float:
    run, layout = made(name, MIDDLE, HONEST)
    ready = updates(coordinator.address, run, layout, HONEST)
    return max(at_once(lambda one: send(coordinator.address, one), ready, most=4))


class _Stalling:
    """200 streams of parts on which nothing comes, for as long as the context lasts."""

    def __init__(self, address: str) -> None:
        self._channel, self._over = grpc.insecure_channel(address), threading.Event()
        stub = pb_grpc.FederationStub(self._channel)  # type: ignore[no-untyped-call]  # generated code
        self._calls: list[Future[Any]] = [stub.AppendUpload.future(self._nothing()) for _ in range(STALLED)]

    def _nothing(self) -> Iterator[pb.UploadPart]:
        self._over.wait()
        yield from ()

    def __enter__(self) -> _Stalling:
        return self

    def health_s(self) -> float:
        assert not any(call.done() for call in self._calls), "a stalled upload was dropped before its time"
        began = time.perf_counter()
        health_pb2_grpc.HealthStub(self._channel).Check(health_pb2.HealthCheckRequest(), timeout=30)
        return time.perf_counter() - began

    def __exit__(self, *_: object) -> None:
        for call in self._calls:
            call.cancel()
        self._over.set()
        self._channel.close()


PARTS = {
    "ingest": ingest,
    "fold": fold,
    "large-round": large_round,
    "replicas": replicas,
    "memory": memory,
    "stalled": stalled,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args()
    load.use_own_connections()
    figures = []
    with tempfile.TemporaryDirectory(prefix="edgetune-bench-") as folder:
        for name in args.only:
            for figure in PARTS[name](args.repeats, Path(folder)):
                print(figure, flush=True)
                figures.append(figure)
    if args.json:
        told = [dataclasses.asdict(figure) | {"good": figure.good} for figure in figures]
        args.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return 0 if all(figure.good for figure in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
