"""Federations of real processes that send scalars: every method learns, histories rebuild adapters, forms mix."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from pathlib import Path

import numpy as np
import pytest

from edge_client.releases import Releases
from edge_client.session import methods
from edge_client.transport import Connection
from tests.processes import CoordinatorProcess, edgetune, finished, start_client, write_texts
from wire.messages import RunStatus

WORDS = ["alpha", "beta"]
ADAPTER = '{ id = "lora", rank = 4, tuned = "B" }'
COMMON = """
name = "toy"
rounds = 6
seed = 1
[base]
model = "toy"
format = "toy"
[cohort]
goal = 2
minimum = 2
deadline_s = 60.0
"""
STEPS = (
    f"local_steps = 60\nbatch = 4\nsequence_length = 64\nepsilon = 0.01\nlearning_rate = 0.02\nadapter = {ADAPTER}\n"
)
RUNS = {
    "mezo": COMMON + "[method]\nid = 'mezo'\n" + STEPS,
    "decomfl": COMMON + "[method]\nid = 'decomfl'\n" + STEPS,
    "hiso": COMMON + "[method]\nid = 'hiso'\n" + STEPS,
    "one-sided": COMMON + "[method]\nid = 'decomfl'\ndifference = 'one-sided'\nperturbations = 2\n" + STEPS,
    "kseed": COMMON + "[method]\nid = 'kseed'\npool = 512\n" + STEPS,
    "kseed-pro": COMMON + "[method]\nid = 'kseed'\npool = 512\npro = true\n" + STEPS,
    "ferret": COMMON + f"[method]\nid = 'ferret'\nprojections = 512\nlearning_rate = 0.3\nadapter = {ADAPTER}\n",
    "mixed": COMMON
    + f"[method]\nid = 'lora'\nlearning_rate = 0.02\nadapter = {ADAPTER}\n"
    + "[aggregator]\nid = 'mean'\nweight_by = 'variance'\n[forward_method]\nid = 'mezo'\n"
    + STEPS,
}


def federate(
    folder: Path, text: str, coordinator: CoordinatorProcess
) -> tuple[RunStatus, list[list[dict[str, object]]]]:
    (folder / "spec.toml").write_text(text)
    created = edgetune("run", "create", folder / "spec.toml", "--coordinator", coordinator.address)
    assert created.returncode == 0, created.stderr
    clients = [
        start_client(coordinator.address, write_texts(folder / f"{w}.jsonl", w), folder / w, name=f"d-{w}")
        for w in WORDS
    ]
    told = finished(clients)
    with Connection(coordinator.address) as connection:
        return connection.status("toy"), told


@pytest.mark.parametrize("name", RUNS)
def test_every_method_lowers_the_loss_and_can_be_computed_again(name: str, tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        ended, told = federate(tmp_path, RUNS[name], coordinator)
        if name != "mixed":
            shown = [
                edgetune("run", "replay", "toy", "--coordinator", coordinator.address, "--backend", b, "--json")
                for b in ("numpy", "numba", "torch")
            ]
            assert len({json.loads(s.stdout)["adapter"] for s in shown}) == 1, shown
    losses = [release.held_out_loss or 0.0 for release in ended.releases]
    assert ended.state == "done" and losses[-1] < losses[0] - 0.1, losses
    sent = [e for events in told for e in events if e["event"] == "submitted" and e["kind"] == "train"]
    if name in ("mezo", "decomfl", "hiso"):
        assert {e["bytes_up"] for e in sent} == {23 + 2 * 60}
    verified = edgetune("run", "verify", "toy", "--store", tmp_path / "store", "--json")
    assert verified.returncode == 0 and json.loads(verified.stdout)["verified"], verified.stdout


@pytest.mark.parametrize("name", ["decomfl", "hiso", "kseed"])
def test_a_late_device_gets_there_from_history_alone(name: str, tmp_path: Path) -> None:
    """Release by release, in one leap, and from the coordinator's own replay: the same adapter, bit for bit."""
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        federate(tmp_path, RUNS[name], coordinator)
        with Connection(coordinator.address) as connection:
            run, layout = connection.describe("toy")
            initial = methods(run)[0].tunes().initial(layout, run.seed)
            always, late = Releases(), Releases()
            followed = [always.fetch(connection, run, layout, initial, v) for v in range(7)][-1]
            leapt = late.fetch(connection, run, layout, initial)
            back = always.fetch(connection, run, layout, initial, 3)
            snapshot = connection.release("toy", 8 * layout.size, None)
    assert np.array_equal(followed.trajectory.adapter, leapt.trajectory.adapter)
    assert not np.array_equal(back.trajectory.adapter, leapt.trajectory.adapter)
    assert snapshot.sizes == ()
    assert np.array_equal(np.frombuffer(snapshot.data[: 4 * layout.size], "<f4"), leapt.trajectory.adapter)


def test_runs_whose_rows_do_not_go_together_are_refused_by_name(tmp_path: Path) -> None:
    texts = {
        "another adapter": (RUNS["mixed"].replace("rank = 4", "rank = 2", 1), "give both the same"),
        "curvature": (RUNS["mixed"].replace("'mezo'", "'hiso'"), "neither pool nor curvature"),
        "optimizer": (RUNS["mezo"] + "[server_optimizer]\nid = 'adam'\n", "needs average"),
        "steps": (RUNS["mezo"].replace("local_steps = 60", "local_steps = 0"), "local_steps must lie between"),
    }
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        for text, said in texts.values():
            (tmp_path / "bad.toml").write_text(text)
            done = edgetune("run", "create", tmp_path / "bad.toml", "--coordinator", coordinator.address)
            assert (done.returncode in (1, 2)) and said in done.stderr, done.stderr


class CountingProxy:
    """Loopback TCP in between that counts the bytes a client sends, framing and headers and all."""

    def __init__(self, address: str) -> None:
        host, port = address.rsplit(":", 1)
        self._to, self.sent = (host, int(port)), 0
        self._door = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._door.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._door.accept()
            far = socket.create_connection(self._to)
            threading.Thread(target=self._pump, args=(near, far, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                self.sent += len(data) if up else 0
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize(("name", "limit"), [("decomfl", 2_000), ("hiso", 2_000), ("kseed", 18_000)])
def test_a_client_round_is_small_on_the_socket_too(name: str, limit: int, tmp_path: Path) -> None:
    """All rounds of one client, from its first connection on, by the bytes that it really sent."""
    text = RUNS[name].replace("goal = 2", "goal = 1").replace("minimum = 2", "minimum = 1")
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        (tmp_path / "spec.toml").write_text(text)
        assert edgetune("run", "create", tmp_path / "spec.toml", "--coordinator", coordinator.address).returncode == 0
        proxy = CountingProxy(coordinator.address)
        client = start_client(proxy.address, write_texts(tmp_path / "a.jsonl", "a"), tmp_path / "a", name="d-a")
        (events,) = finished([client])
    payloads = [e["bytes_up"] for e in events if e["event"] == "submitted" and e["kind"] == "train"]
    assert len(payloads) == 6 and max(payloads) <= 400
    print(name, proxy.sent / 7, "bytes a round on the socket")
    assert max(payloads) < proxy.sent / 7 < limit
