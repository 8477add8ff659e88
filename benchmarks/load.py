"""Devices without a model, for measuring coordinators: each has a connection of its own, a task, and an update to send."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
import psutil

from edge_client import calls
from edge_client.transport import Connection
from tests.processes import environment
from wire import run_spec, spec
from wire.delta import Delta, Layout, Tensor
from wire.messages import Contribution, Metrics, Task
from wire.run_spec import RunSpec

BASE = "b" * 64
T = TypeVar("T")
R = TypeVar("R")


def use_own_connections() -> None:
    """gRPC lets all channels of a process share one connection; devices do not."""
    calls.OPTIONS.append(("grpc.use_local_subchannel_pool", 1))


class BareProcess:
    """`benchmarks.bare_coordinator`, running; with a folder it keeps there what it gets."""

    def __init__(self, folder: Path | None = None) -> None:
        line = [sys.executable, "-m", "benchmarks.bare_coordinator", *([] if folder is None else [str(folder)])]
        self.process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment())
        assert self.process.stdout is not None
        self.address: str = json.loads(self.process.stdout.readline())["address"]

    def __enter__(self) -> BareProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.wait()


def cpu_s(pid: int) -> float:
    """User and system time of a process and its children so far, by Linux's clock of each: /proc tells only hundredths."""
    children = [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return sum(time.clock_gettime((~one << 3) | 2) for one in (pid, *children))


def peak_mb(pid: int) -> float:
    """The most memory that a process had resident, MB of 10^6 bytes."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024 / 1e6


@dataclasses.dataclass(frozen=True)
class Took:
    """What some work took: wall seconds, and CPU seconds of the server and of this process, which is the load."""

    wall_s: float
    server_s: float
    load_s: float


@contextlib.contextmanager
def timed(pid: int) -> Iterator[Callable[[], Took]]:
    """What the block took, by a call after it."""
    server, load, wall = cpu_s(pid), time.process_time(), time.perf_counter()
    took: list[Took] = []
    yield lambda: took[0]
    took.append(Took(time.perf_counter() - wall, cpu_s(pid) - server, time.process_time() - load))


def made(name: str, size: int, devices: int, **changes: object) -> tuple[RunSpec, Layout]:
    """A run of one round of float32 updates of `size` bytes that wants all of `devices`."""
    table = {
        "name": name,
        "base": {"model": "toy", "format": "toy", "digest": BASE},
        "rounds": 1,
        "cohort": {"goal": devices, "minimum": devices},
        "method": {"id": "lora"},
        "codec": "float32",
    }
    return run_spec.parse(table | changes), Layout((Tensor("w", (size // 4,)),))


@dataclasses.dataclass(frozen=True, eq=False)
class Update:
    """One device's part in a round, ready to be sent."""

    contribution: Contribution
    payload: bytes


def update(run: RunSpec, layout: Layout, device: str, number: int, release: str) -> Update:
    """Bytes that no other device has: the same would be stored once."""
    chain = run.chain()
    assert chain is not None
    values = np.full(layout.size, np.float32(1e-3 * (number + 1)))
    values[:8] = np.random.default_rng(list(f"{run.name} {device}".encode())).uniform(-1, 1, 8)
    payload, _ = chain.encode(Delta(layout, values), chain.init(layout))
    named = (device, run.name, 1, 1, spec.bytes_digest(payload), len(payload), 1, BASE, release)
    return Update(Contribution(*named, Metrics()), payload)


def updates(address: str, run: RunSpec, layout: Layout, devices: int) -> list[Update]:
    """A run at a coordinator, and an update of each of its devices, which have their tasks."""
    with Connection(address) as connection:
        connection.create_run(run, layout, np.zeros(layout.size, np.float32))
    release = at_once(lambda n: _release(address, run, f"d-{n}"), range(devices))
    return [update(run, layout, f"d-{n}", n, release[n]) for n in range(devices)]


def _release(address: str, run: RunSpec, device: str) -> str:
    with Connection(address) as connection:
        task = connection.check_in(device, (run.name,), 60.0)
        assert isinstance(task, Task), task
        return task.release_digest


def send(address: str, one: Update) -> float:
    """Seconds until the receipt, over a connection made for it."""
    began = time.perf_counter()
    with Connection(address) as connection:
        connection.send(one.contribution, one.payload)
    return time.perf_counter() - began


def at_once(work: Callable[[T], R], what: Sequence[T], most: int = 64) -> list[R]:
    with ThreadPoolExecutor(min(most, len(what))) as pool:
        return list(pool.map(work, what))
