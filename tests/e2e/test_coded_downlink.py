"""Both directions coded, between real processes: what it learns, what it costs on the socket, and who goes on after a restart."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
import pytest

from edge_client.identity import Identity, enroll
from edge_client.methods import Trained
from edge_client.participate import participate
from edge_client.releases import Releases
from edge_client.session import Device, Session, Work, methods
from edge_client.state import DeviceState
from edge_client.transport import Connection
from edge_client.view import View
from tests.links import Link
from tests.processes import CoordinatorProcess, administrator, edgetune, finished, identified, start_client, write_texts
from tests.updates import make
from wire.codecs import chain
from wire.delta import Delta, Layout, Tensor
from wire.identity import Invitation
from wire.run_spec import RunSpec

DEVICES, ROUNDS = 4, 6
MODULES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
LAYOUT = Layout(
    tuple(
        Tensor(f"base_model.model.model.layers.{layer}.{module}.lora_{factor}.weight", shape, f"lora_{factor}")  # type: ignore[arg-type]
        for layer in range(30)
        for module in MODULES
        for factor, shape in (("A", (16, 12)), ("B", (12, 16)))
    )
)
"""The tensors of SmolLM2-135M with rank 16 on all linear layers, all named, and made small: 80,640 parameters."""


class Stub:
    """An engine without a model, and a method whose updates follow from the round and the device."""

    def __init__(self, device: int) -> None:
        self._device = device

    def write(self, adapter: Any) -> None:
        pass

    def loss(self, held_out: Any) -> tuple[float, int]:
        return 12.5, 10

    def train(self, engine: Any, start: Any, train: Any, draw: Any, progress: Any = None) -> Trained:
        vector = np.random.default_rng([self._device, start.version]).normal(0, 1e-3, LAYOUT.size).astype(np.float32)
        return Trained(Delta(LAYOUT, vector), start.adapter + vector, 2.5, 8, 4096, 1.0, 16)


class StubSession(Session):
    """A client's session but for the model."""

    def __init__(self, device: int) -> None:
        super().__init__(Device(Path()), ())
        self._stub: Any = Stub(device)

    def work(self, run: RunSpec, layout: Layout) -> Work:
        initial = np.zeros(layout.size, np.float32)
        return Work(run, View(layout), run.chain(), self._stub, self._stub, self._releases, initial, [], [], 12)


@pytest.mark.parametrize("identities", [False, True], ids=["in the clear", "over mutual TLS"])
def test_a_client_round_costs_its_payloads_and_at_most_two_kilobytes_on_the_socket(
    identities: bool, tmp_path: Path
) -> None:
    """All bytes both ways, from the first of the connection on: framing, headers, certificates and control calls."""
    run = make(
        "both", rounds=ROUNDS, cohort={"goal": DEVICES}, codec="top_k_int4_5", downlink={"codec": "top_k_int4_5"}
    )
    overheads: dict[int, list[int]] = {number: [] for number in range(DEVICES)}

    def take_part(number: int, address: str, identity: Identity | None) -> None:
        link, state = Link(address), DeviceState(tmp_path / f"d{number}", f"device-{number:06x}")
        counted = [0]

        def tell(event: str, told: dict[str, Any]) -> None:
            if event == "submitted":
                counted.append(link.bytes_up + link.bytes_down)
                overheads[number].append(counted[-1] - counted[-2] - told["bytes_up"] - told["bytes_down"])

        with Connection(link.address, identity=identity) as connection:
            participate(connection, StubSession(number), state, (run.name,), False, tell)
        state.close()
        link.close()

    with coordinator_at(tmp_path / "store", identities) as coordinator:
        with administrator(coordinator) if identities else Connection(coordinator.address) as admin:
            admin.create_run(run, LAYOUT, np.zeros(LAYOUT.size, np.float32))
            cards = [_enrolled(admin, tmp_path / f"d{n}", n) if identities else None for n in range(DEVICES)]
        clients = [
            threading.Thread(target=take_part, args=(n, coordinator.address, card)) for n, card in enumerate(cards)
        ]
        for client in clients:
            client.start()
        for client in clients:
            client.join(60)
    for number, (first, *others) in overheads.items():
        print(f"device {number}: {first:,} bytes with the first update, then {others}")
        assert len(others) == ROUNDS and sum(others) / ROUNDS <= 2_000
        assert first <= (10_000 if identities else 4_000), "a handshake, and the run described once"


def coordinator_at(store: Path, identities: bool) -> CoordinatorProcess:
    return identified(store) if identities else CoordinatorProcess(store)


def _enrolled(admin: Connection, folder: Path, number: int) -> Identity:
    text, _ = admin.invite("ann", None, 60.0)
    return enroll(Invitation.parse(text), folder / "identity", f"device-{number:06x}")


COHORTS = {
    "rounds": "goal = 2\nminimum = 2\n",
    "buffers": 'mode = "async"\nbuffer = 2\nmax_staleness = 4\n',
}
SPEC = """
name = "toy"
rounds = 8
codec = "top_k_int4"
seed = 1
[base]
model = "toy"
format = "toy"
[cohort]
deadline_s = 60.0
{cohort}
[method]
id = "lora"
rank = 10
local_steps = 30
batch = 4
sequence_length = 64
learning_rate = 0.01
[server_optimizer]
id = "momentum"
learning_rate = 0.5
momentum = 0.5
[downlink]
codec = "top_k_int4"
"""


@pytest.mark.parametrize("cohort", COHORTS)
def test_a_federation_coded_both_ways_learns_though_a_client_is_killed_and_can_be_computed_again(
    cohort: str, tmp_path: Path
) -> None:
    (tmp_path / "spec.toml").write_text(SPEC.format(cohort=COHORTS[cohort]))
    texts = {word: write_texts(tmp_path / f"{word}.jsonl", word) for word in ("alpha", "beta")}
    with CoordinatorProcess(tmp_path / "store") as coordinator:

        def started(word: str) -> Popen[str]:
            return start_client(coordinator.address, texts[word], tmp_path / word, name=f"d-{word}")

        created = edgetune("run", "create", tmp_path / "spec.toml", "--coordinator", coordinator.address)
        assert created.returncode == 0, created.stderr
        clients = {word: started(word) for word in texts}
        with Connection(coordinator.address) as connection:
            next(status for status in connection.watch("toy") if status.round >= 3)
            clients["beta"].kill()
            clients["beta"].communicate()
            told = finished([clients["alpha"], started("beta")])
            status = connection.status("toy")
            newest = connection.release("toy", 1 << 20, None)
            run, layout = connection.describe("toy")
            initial = methods(run)[0].tunes().initial(layout, run.seed)
            late = Releases().fetch(connection, run, layout, initial)
    losses = [release.held_out_loss or 0.0 for release in status.releases if release.held_out_tokens]
    assert status.state == "done" and losses[-1] < losses[0] - 0.2, losses
    assert late.trajectory.adapter.tobytes() == newest.data
    assert late.bytes < len(newest.data), "eight coded deltas are shorter than the adapter"
    sent = [event for events in told for event in events if event["event"] == "submitted"]
    assert all(event["bytes_down"] < len(newest.data) / 2 for event in sent)
    assert sum(release.bytes_down for release in status.releases) > 0
    verified = edgetune("run", "verify", "toy", "--store", tmp_path / "store", "--json")
    assert verified.returncode == 0 and json.loads(verified.stdout)["verified"], verified.stdout


def test_a_runs_codecs_can_be_named_where_it_is_created(tmp_path: Path) -> None:
    (tmp_path / "spec.toml").write_text(SPEC.format(cohort=COHORTS["rounds"]))
    named = ("--codec", "int8", "--downlink-codec", "rotated_ecsq")
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        line = ("run", "create", tmp_path / "spec.toml", "--coordinator", coordinator.address, *named)
        assert edgetune(*line).returncode == 0
        with Connection(coordinator.address) as connection:
            run, _ = connection.describe("toy")
    assert run.chain() == chain.codec("int8")
    assert run.downlink is not None and run.downlink.chain() == chain.codec("rotated_ecsq")
