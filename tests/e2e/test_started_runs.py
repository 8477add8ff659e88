"""Runs that begin where others ended: real processes on the toy engine, by every way in which releases travel."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_client.transport import Connection
from tests.processes import CoordinatorProcess, edgetune, finished, start_client, write_texts
from wire import spec
from wire.messages import RunStatus

TABLES = """
[base]
model = "toy"
format = "toy"
[cohort]
goal = 2
[method]
"""
FIRST = f"""
name = "first"
rounds = 3
codec = "float32"
{TABLES}
id = "lora"
rank = 4
local_steps = 6
learning_rate = 0.05
"""
SECOND = FIRST.replace('"first"', '"second"').replace("rank = 4", "rank = 6").replace("rounds = 3", "rounds = 2")
LOSSES = f"""
name = "second"
rounds = 2
{TABLES}
id = "mezo"
local_steps = 2
perturbations = 2
learning_rate = 0.001
[method.adapter]
id = "lora"
rank = 4
"""
WAYS = {
    "whole adapters": SECOND,
    "coded deltas": SECOND + '[downlink]\ncodec = "int8"\n',
    "steps": LOSSES,
}


def play(address: str, folder: Path, run: str) -> RunStatus:
    devices = [
        start_client(
            address, write_texts(folder / f"{word}.jsonl", word), folder / word, "--run", run, name=f"d-{word}"
        )
        for word in ("alpha", "beta")
    ]
    finished(devices)
    with Connection(address) as connection:
        return connection.status(run)


def create(address: str, folder: Path, text: str, *more: str) -> tuple[int, str]:
    (folder / "spec.toml").write_text(text, encoding="utf-8")
    made = edgetune("run", "create", folder / "spec.toml", "--coordinator", address, *more)
    return made.returncode, made.stderr


@pytest.mark.parametrize("way", sorted(WAYS))
def test_a_second_stage_begins_at_the_loss_that_the_first_one_reached(way: str, tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        address = coordinator.address
        assert create(address, tmp_path, FIRST) == (0, "")
        first = play(address, tmp_path, "first")
        assert create(address, tmp_path, WAYS[way], "--start-from", "first") == (0, "")
        second = play(address, tmp_path, "second")
        with Connection(address) as connection:
            described, _ = connection.describe("second")
            release = connection.release("second", 1 << 20, 0).release
    reached = [release.held_out_loss or 0.0 for release in first.releases]
    assert reached[-1] < reached[0] - 0.2
    assert second.state == "done"
    assert second.releases[0].held_out_loss == pytest.approx(reached[-1], abs=1e-4)
    assert described.start == release.adapter and spec.plain(described)["start"] == described.start
    verified = edgetune("run", "verify", "second", "--store", tmp_path / "store", "--json")
    assert verified.returncode == 0 and json.loads(verified.stdout)["verified"]


def test_a_start_that_cannot_be_is_refused_by_what_is_wrong_with_it(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        address = coordinator.address
        assert create(address, tmp_path, FIRST)[0] == 0
        for named, text, said in [
            ("nobody", SECOND, "nobody"),
            ("first@9", SECOND, "9"),
            ("first@x", SECOND, "no such folder, and no RUN or RUN@VERSION"),
            (str(tmp_path), SECOND, "adapter_config.json"),
            ("first", SECOND + '[method.adapter]\nid = "lora"\nrank = 4\ntuned = "B"\n', "not both free and shared"),
        ]:
            code, error = create(address, tmp_path, text, "--start-from", named)
            assert code != 0 and said in error and "Traceback" not in error, error
        pinned = f'start = "{"0" * 64}"\n{SECOND}'
        code, error = create(address, tmp_path, pinned)
        assert code != 0 and "another adapter than was sent" in error
