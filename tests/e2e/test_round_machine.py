"""Real processes under a person's hand, and runs in buffers with a device that is slow."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from subprocess import Popen

import pytest

from edge_client.transport import Connection
from tests.processes import TOY_SPEC, CoordinatorProcess, edgetune, finished, start_client, write_texts
from tests.processes import write_toy_spec as toy
from wire.messages import ReleaseManifest, RunStatus

SLOW_STEPS = {"local_steps": 40, "learning_rate": 0.002}


def start(address: str, folder: Path, word: str) -> Popen[str]:
    return start_client(address, write_texts(folder / f"{word}.jsonl", word), folder / word, name=word)


def create(address: str, spec: Path) -> None:
    result = edgetune("run", "create", spec, "--coordinator", address)
    assert result.returncode == 0, result.stderr


def control(address: str, action: str, *more: str) -> RunStatus:
    result = edgetune("run", action, "toy", "--coordinator", address, *more)
    assert result.returncode == 0 and result.stderr == "", result.stderr
    with Connection(address) as connection:
        return connection.status("toy")


def settled(address: str) -> RunStatus:
    """The status once nothing has changed for a second."""
    with Connection(address) as connection:
        seen, since = connection.status("toy"), time.monotonic()
        while time.monotonic() < since + 1.0:
            time.sleep(0.1)
            if (now := connection.status("toy")) != seen:
                seen, since = now, time.monotonic()
    return seen


def until(address: str, version: int) -> None:
    with Connection(address) as connection:
        next(s for s in connection.watch("toy") if s.releases[-1].version >= version)


def manifests(address: str) -> list[ReleaseManifest]:
    with Connection(address) as connection:
        versions = [release.version for release in connection.status("toy").releases]
        return [connection.release("toy", 1 << 20, version).release for version in versions]


def test_a_run_is_paused_resumed_and_stopped_with_its_newest_release(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        create(coordinator.address, toy(tmp_path / "spec.toml", goal=2, rounds=10_000, **SLOW_STEPS))
        clients = [start(coordinator.address, tmp_path, word) for word in ("alpha", "beta")]
        until(coordinator.address, 2)
        assert control(coordinator.address, "pause", "--reason", "new text on Monday [/]").state == "paused"
        still = settled(coordinator.address)
        assert (still.state, still.detail) == ("paused", "new text on Monday [/]")
        assert still.accepted == still.offered, "what was handed out came back, and nothing more was handed out"
        shown = edgetune("run", "status", "toy", "--coordinator", coordinator.address)
        assert "toy: paused" in shown.stdout and "new text on Monday [/]" in shown.stdout
        assert control(coordinator.address, "resume").state == "running"
        until(coordinator.address, still.releases[-1].version + 2)
        assert control(coordinator.address, "stop", "--reason", "good enough").state == "stopped"
        told = finished(clients)
        ended = settled(coordinator.address)
        again = edgetune("run", "resume", "toy", "--coordinator", coordinator.address)
        assert again.returncode == 1 and "has ended: it is stopped" in again.stderr and "Traceback" not in again.stderr
    assert all(events[-1]["event"] == "finished" for events in told)
    assert (ended.state, ended.detail, len(ended.releases) > 4) == ("stopped", "good enough", True)
    verified = edgetune("run", "verify", "toy", "--store", tmp_path / "store", "--json")
    assert verified.returncode == 0 and json.loads(verified.stdout)["verified"]


BUFFERED = TOY_SPEC.replace("goal = {goal}", 'mode = "async"\nbuffer = 2\nmax_staleness = 100\nover_selection = 2.0')
MEZO = """[method]
id = "mezo"
local_steps = 20
batch = 4
sequence_length = 64
epsilon = 0.01
learning_rate = 0.02
adapter = {{ id = "lora", rank = 4, tuned = "B" }}
"""
METHODS = {"lora": BUFFERED, "mezo": BUFFERED[: BUFFERED.index("[method]")] + MEZO}


@pytest.mark.parametrize("method", METHODS)
def test_a_slow_device_holds_nobody_up_and_its_late_update_still_counts(method: str, tmp_path: Path) -> None:
    values = {"name": "toy", "rounds": 20, "codec": "top_k_int4", "minimum": 1, "deadline_s": 60.0, **SLOW_STEPS}
    (tmp_path / "spec.toml").write_text(METHODS[method].format(**values))
    first = CoordinatorProcess(tmp_path / "store")
    create(first.address, tmp_path / "spec.toml")
    slow = start(first.address, tmp_path, "slow")
    assert slow.stdout is not None
    while '"step"' not in slow.stdout.readline():
        assert slow.poll() is None
    slow.send_signal(signal.SIGSTOP)
    fast = [start(first.address, tmp_path, word) for word in ("alpha", "beta")]
    until(first.address, 3)
    first.kill()
    with CoordinatorProcess(tmp_path / "store", first.address) as second:
        until(second.address, 5)
        slow.send_signal(signal.SIGCONT)
        finished([slow, *fast])
        chain = manifests(second.address)
        with Connection(second.address) as connection:
            ended = connection.status("toy")
    assert (ended.state, len(chain)) == ("done", 21)
    assert all(len(release.contributions) == 2 for release in chain[1:])
    mine = [share for release in chain for share in release.contributions if share.device == "slow"]
    assert mine[0].round == 1 and (mine[0].staleness or 0) >= 4, mine[:3]
    losses = [release.held_out_loss or 0.0 for release in ended.releases]
    assert losses[-1] < losses[0] - 0.05, losses
    verified = edgetune("run", "verify", "toy", "--store", tmp_path / "store")
    assert verified.returncode == 0, verified.stdout
    if method == "mezo":
        with CoordinatorProcess(tmp_path / "store") as third:
            shown = edgetune("run", "replay", "toy", "--coordinator", third.address, "--json")
            assert shown.returncode == 0, shown.stderr
