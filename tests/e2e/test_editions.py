"""Programs of two editions over one store, as in the middle of an upgrade: nothing is lost, and what cannot be is said."""

from __future__ import annotations

import json
from pathlib import Path

from edge_client.transport import Connection
from tests.processes import (
    CoordinatorProcess,
    edgetune,
    finished,
    output,
    start_client,
    write_texts,
    write_toy_spec,
)

OLDER = "tests.older"
ASYNC = 'mode = "async"\nbuffer = 1\nmax_staleness = 1\n'


def create(coordinator: CoordinatorProcess, spec: Path) -> None:
    made = edgetune("run", "create", spec, "--coordinator", coordinator.address)
    assert made.returncode == 0, made.stderr


def buffered_spec(folder: Path) -> Path:
    """A run that only programs of the second edition can read."""
    spec = write_toy_spec(folder / "buffered.toml", name="buffered", rounds=2)
    spec.write_text(spec.read_text().replace("goal = 3\n", ASYNC))
    return spec


def test_replicas_and_clients_of_two_editions_share_a_run_while_each_is_replaced_in_turn(tmp_path: Path) -> None:
    store = tmp_path / "store"
    newer = CoordinatorProcess(store)  # the first of the new program migrates the schema
    older = CoordinatorProcess(store, program=OLDER)
    spec = write_toy_spec(tmp_path / "toy.toml", rounds=6, goal=4, minimum=4, local_steps=20, learning_rate=0.01)
    create(newer, spec)
    joined = [(older, OLDER), (older, "edgetune"), (newer, OLDER), (newer, "edgetune")]
    clients = [
        start_client(
            coordinator.address, write_texts(tmp_path / f"{n}.jsonl", f"w{n}"), tmp_path / f"d{n}",
            name=f"d{n}", program=program,
        )
        for n, (coordinator, program) in enumerate(joined)
    ]  # fmt: skip
    with Connection(newer.address) as connection:
        next(status for status in connection.watch("toy") if status.round >= 3 and 0 < status.accepted < 4)
    older.kill()
    replaced = CoordinatorProcess(store, older.address)
    told = finished(clients)
    newer.stop()
    replaced.stop()
    sent = [(e["round"], n) for n, events in enumerate(told) for e in events if e["event"] == "submitted"]
    assert sorted(sent) == [(number, n) for number in range(1, 8) for n in range(4)]
    verified = edgetune("run", "verify", "toy", "--store", store, "--json")
    assert verified.returncode == 0, verified.stderr
    assert [r["contributions"] for r in json.loads(verified.stdout)["releases"]] == [0] + [4] * 6


def test_a_run_that_asks_for_more_is_left_alone_by_older_replicas_and_refused_to_older_clients(tmp_path: Path) -> None:
    store = tmp_path / "store"
    data = write_texts(tmp_path / "a.jsonl", "alpha")
    with CoordinatorProcess(store) as newer, CoordinatorProcess(store, program=OLDER) as older:
        create(newer, buffered_spec(tmp_path))
        at_newer = start_client(newer.address, data, tmp_path / "one", name="one", program=OLDER)
        _, said = output(at_newer, 60)
        assert at_newer.returncode == 1 and "'buffered' needs" in said and "pip install --upgrade edgetune" in said
        waiting = start_client(older.address, data, tmp_path / "two", "--run", "buffered", name="two")
        assert waiting.stdout is not None
        with Connection(newer.address) as connection:
            assert connection.status("buffered").offered == 0
        older.kill()
        with CoordinatorProcess(store, older.address):
            [told] = finished([waiting])
    assert [e["kind"] for e in told if e["event"] == "submitted"] == ["train", "train", "evaluate"]
    assert edgetune("run", "verify", "buffered", "--store", store).returncode == 0
