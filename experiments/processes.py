"""A federation of real processes: one coordinator, N clients, started by the commands that people type, watched, and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wire.errors import MachineError

Event = dict[str, Any]
POLL_S = 0.5
STARTED = "processes"
"""The file that names them: a number and when it was started, a line each."""


def end_orphans(out: Path) -> None:
    """End what an earlier `Processes` in this folder left behind when it was killed; never another process of its number."""
    path = out / STARTED
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(
            ValueError, ProcessLookupError
        ):  # a line of which a power cut left a part names nobody
            pid, created = line.split()
            if _created(int(pid)) == float(created) != 0.0:
                os.kill(int(pid), signal.SIGKILL)


def _created(pid: int) -> float:
    """When a process was started, in Unix seconds; 0 for one that is gone."""
    import psutil

    try:
        return float(psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return 0.0


class Processes:
    """Children that are gone when the `with` block is left, and the memory that they and this process use together."""

    def __init__(self, out: Path) -> None:
        self._out, self._children = out, dict[str, subprocess.Popen[str]]()
        self.events: queue.Queue[Event] = queue.Queue()
        self.peak_rss_bytes = 0

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children.values():
            child.terminate()
        for child in self._children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
            child.kill()

    def coordinator(self) -> str:
        """Start it on a free port; its address."""
        child = self._start(
            "coordinator", "coordinator", "serve", "--store", str(self._out / "store"), "--listen", "127.0.0.1:0"
        )
        assert child.stdout is not None
        line = child.stdout.readline()
        said: Event = json.loads(line) if line else {}
        if said.get("event") != "listening":
            raise MachineError(f"the coordinator did not start: {self._last_words('coordinator')}")
        return str(said["address"])

    def client(self, name: str, address: str, runs: list[str], data: Path, more: list[str]) -> None:
        """Start a client; its events arrive in `events` with its name."""
        wanted = [word for run in runs for word in ("--run", run)]
        state = str(self._out / "clients" / name)
        line = ["client", "join", "--coordinator", address, "--data", str(data), "--name", name, "--state", state]
        child = self._start(name, *line, *wanted, *more)
        threading.Thread(target=self._read, args=(name, child), daemon=True).start()

    def until_ended(self, names: list[str]) -> Iterator[Event]:
        """Events as they come, until the named clients have ended. Raises MachineError if one of them fails."""
        waiting = set(names)
        while waiting:
            self._measure()
            try:
                event = self.events.get(timeout=POLL_S)
            except queue.Empty:
                continue
            if event["event"] == "exited":
                waiting.discard(event["client"])
                if event["code"] != 0:
                    raise MachineError(f"client {event['client']} failed: {self._last_words(event['client'])}")
            yield event

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        (self._out / "logs").mkdir(exist_ok=True)
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        with (self._out / "logs" / f"{name}.txt").open("w") as log:
            child = subprocess.Popen(  # this program itself
                [sys.executable, "-m", "edgetune", *arguments, "--json"],
                stdout=subprocess.PIPE, stderr=log, text=True, env=environment, start_new_session=True,
            )  # fmt: skip
        self._children[name] = child
        with (self._out / STARTED).open("a") as started:
            started.write(f"{child.pid} {_created(child.pid)}\n")
        return child

    def _read(self, name: str, child: subprocess.Popen[str]) -> None:
        assert child.stdout is not None
        for line in child.stdout:
            self.events.put(json.loads(line) | {"client": name})
        self.events.put({"event": "exited", "client": name, "code": child.wait()})

    def _measure(self) -> None:
        import psutil

        total = 0
        for pid in (os.getpid(), *(child.pid for child in self._children.values() if child.poll() is None)):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += psutil.Process(pid).memory_info().rss
        self.peak_rss_bytes = max(self.peak_rss_bytes, total)

    def _last_words(self, name: str) -> str:
        time.sleep(0.1)
        lines = (self._out / "logs" / f"{name}.txt").read_text().strip().splitlines()
        return lines[-1] if lines else "it said nothing"
