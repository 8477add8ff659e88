"""Real processes for tests: a coordinator on a free port, and clients, by the very commands that people type."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from coordinator import authority
from edge_client.identity import Identity
from edge_client.transport import Connection

START_S = 30.0


def command(*arguments: str | Path, program: str = "edgetune") -> list[str]:
    return [sys.executable, "-m", program, *map(str, arguments)]


def environment() -> dict[str, str]:
    """This process's, with one thread a process: tests share few cores."""
    alone = {"XDG_DATA_HOME": f"{tempfile.gettempdir()}/edgetune-nobody"}  # no identity of whoever runs the tests
    told = {"PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | told | alone


class CoordinatorProcess:
    """`edgetune coordinator serve` over a store; `kill` is kill -9, and a new one goes on with the same store."""

    def __init__(
        self,
        store: Path | str,
        listen: str = "127.0.0.1:0",
        *more: str,
        identity: Path | None = None,
        program: str = "edgetune",
        log: Path | None = None,
    ) -> None:
        self.store, self.folder = store, identity
        more = more if identity is None else ("--identity", str(identity), *more)
        self.replicas: dict[int, int] = {}
        line = command("coordinator", "serve", "--store", store, "--listen", listen, "--json", *more, program=program)
        with ExitStack() as files:
            err = files.enter_context(log.open("a")) if log else None
            self.process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=err, text=True, env=environment())
        listening = self.event("listening")
        self.address: str = listening["address"]
        self.enrolment: str = listening.get("enrolment", "")

    def event(self, name: str) -> dict[str, Any]:
        """The next event of a name; those before it are passed over, but for the replicas' processes."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            event: dict[str, Any] = json.loads(line)
            if event["event"] == "replica_started":
                self.replicas[event["replica"]] = event["pid"]
            if event["event"] == name:
                return event
        raise AssertionError(f"the coordinator ended with code {self.process.wait(START_S)}")

    @property
    def identity(self) -> Path:
        """The folder of its identities."""
        return self.folder or Path(self.store) / "identity"

    @property
    def admin(self) -> list[str]:
        """What an administrator of this coordinator adds to a command."""
        return ["--coordinator", self.address, "--identity", str(self.identity)]

    def __enter__(self) -> CoordinatorProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def rss_bytes(self, peak: bool = False) -> int:
        wanted = "VmHWM:" if peak else "VmRSS:"
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith(wanted):
                return int(line.split()[1]) * 1024
        raise AssertionError("the coordinator is gone")


def identified(store: Path, *more: str, log: Path | None = None) -> CoordinatorProcess:
    """A coordinator with identities, made in its store the first time."""
    if not (store / "identity").exists():
        authority.create(store / "identity", ["localhost", "127.0.0.1"])
    return CoordinatorProcess(store, "127.0.0.1:0", *more, log=log)


def administrator(coordinator: CoordinatorProcess) -> Connection:
    return Connection(coordinator.address, identity=Identity.read(coordinator.identity / "admin"))


def start_client(
    address: str, data: Path, state: Path, *more: str, name: str, program: str = "edgetune"
) -> subprocess.Popen[str]:
    where = ("--coordinator", address, "--data", data, "--state", state, "--name", name)
    return subprocess.Popen(
        command("client", "join", *where, "--json", *more, program=program),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )


def edgetune(*arguments: str | Path, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
    """One command to its end."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, env=environment(), timeout=timeout_s, check=False
    )


def finished(clients: Sequence[subprocess.Popen[str]], timeout_s: float = 120.0) -> list[list[dict[str, Any]]]:
    """The events of each client, after all of them have ended well."""
    with ThreadPoolExecutor(max(1, len(clients))) as pool:  # together: one whose pipe is full would hold up the rest
        outputs = list(pool.map(lambda client: output(client, timeout_s), clients))
    for client, (_, err) in zip(clients, outputs, strict=True):
        assert client.returncode == 0, err
    return [[json.loads(line) for line in out.splitlines()] for out, _ in outputs]


def output(client: subprocess.Popen[str], timeout_s: float) -> tuple[str, str]:
    """What it wrote until it ended. One that does not end is aborted: where each of its threads stood is then in what it
    wrote as errors."""
    try:
        return client.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        client.send_signal(signal.SIGABRT)
        out, err = client.communicate()
        return out, f"not ended after {timeout_s:.0f} s; its last words were {out[-500:]}\n{err}"


def write_texts(path: Path, word: str, lines: int = 12) -> Path:
    """A small data file whose text is a device's own."""
    path.write_text("".join(json.dumps({"text": f"{word} {n} " * 6}) + "\n" for n in range(lines)), encoding="utf-8")
    return path


TOY_SPEC = """\
name = "{name}"
rounds = {rounds}
codec = "{codec}"
seed = 1
[base]
model = "toy"
format = "toy"
[cohort]
goal = {goal}
minimum = {minimum}
deadline_s = {deadline_s}
[method]
id = "lora"
rank = 10
local_steps = {local_steps}
batch = 4
sequence_length = 64
learning_rate = {learning_rate}
"""


def write_toy_spec(path: Path, **changes: Any) -> Path:
    """A run of the toy engine: 5,120 parameters, 20 KB of float32."""
    values: dict[str, Any] = {
        "name": "toy",
        "rounds": 3,
        "codec": "float32",
        "goal": 3,
        "minimum": 1,
        "deadline_s": 60.0,
        "local_steps": 4,
        "learning_rate": 0.05,
    }
    path.write_text(TOY_SPEC.format(**values | changes), encoding="utf-8")
    return path
