"""Aggregators of each device's factors, between real processes: two coordinators, and a check from the store alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edge_client.state import tuned_rank
from edge_client.transport import Connection
from tests.processes import CoordinatorProcess, edgetune, finished, start_client, write_texts, write_toy_spec

WORDS = ["alpha", "beta", "gamma"]


@pytest.mark.parametrize("row", ["flora", "flexlora"])
def test_a_run_that_multiplies_factors_learns_and_can_be_computed_again(row: str, tmp_path: Path) -> None:
    spec = write_toy_spec(tmp_path / "spec.toml", rounds=3)
    with spec.open("a") as more:
        more.write('adapter = {id = "lora", rank = 10, history = 90}\n' if row == "flora" else "")
        more.write(f'[aggregator]\nid = "{row}"\n[portions]\nid = "tuned"\nleast_rank = 1\n')
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        made = edgetune("run", "create", spec, "--coordinator", coordinator.address)
        assert made.returncode == 0, made.stderr
        ranks = [("--rank", "2"), (), ()]
        clients = [
            start_client(
                coordinator.address, write_texts(tmp_path / f"{word}.jsonl", word), tmp_path / word, *more, name=word
            )
            for word, more in zip(WORDS, ranks, strict=True)
        ]
        finished(clients)
        with Connection(coordinator.address) as connection:
            described, _ = connection.describe("toy")
        status = edgetune("run", "status", "toy", "--coordinator", coordinator.address, "--json")
    assert tuned_rank(tmp_path / "alpha", described) == 2 and tuned_rank(tmp_path / "beta", described) is None
    losses = [release["held_out_loss"] for release in json.loads(status.stdout)["releases"]]
    assert losses[-1] < losses[0] - 0.2
    verified = edgetune("run", "verify", "toy", "--store", tmp_path / "store", "--json")
    assert verified.returncode == 0, verified.stdout
    errors = [release["aggregation_error"] for release in json.loads(verified.stdout)["releases"][1:]]
    assert len(errors) == 3 and (max(errors) < 1e-5) == (row == "flora")
    said = edgetune("run", "verify", "toy", "--store", tmp_path / "store").stdout
    assert said.count("aggregation error") == 3
