"""Three kinds of device in one run, as real processes: gradients everywhere, gradients above a cut, losses alone."""

from __future__ import annotations

import json
from pathlib import Path

from edge_client.engines import torch_memory
from edge_client.session import settled
from quantize.base_model import build
from tests.models import tiny_llama
from tests.processes import CoordinatorProcess, edgetune, finished, start_client, write_texts
from wire import run_spec

RUN = """\
name = "kinds"
rounds = 2
codec = "int8"
[base]
model = "{model}"
format = "int4-onnx"
[cohort]
goal = 3
minimum = 3
[aggregator]
id = "mean"
weight_by = "variance"
[method]
id = "hybrid"
local_steps = 4
perturbations = 2
batch = 2
sequence_length = 32
learning_rate = 0.02
learning_rate_below = 0.02
adapter = {{ id = "lora_sb", rank = 4 }}
[forward_method]
id = "mezo"
local_steps = 8
batch = 2
sequence_length = 32
learning_rate = 0.02
adapter = {{ id = "lora_sb", rank = 4 }}
"""


def test_devices_send_what_their_memory_allows_and_the_round_can_be_computed_again(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    base = build(str(model), "int4-onnx", tmp_path / "base")
    (tmp_path / "run.toml").write_text(RUN.format(model=model))
    run, adapter = settled(run_spec.read_toml(tmp_path / "run.toml"), base)
    config = type("Config", (), json.loads((base.folder / "config.json").read_text()))
    whole = torch_memory.plan(config, torch_memory.resident(base), adapter.layout(base).size, 2, 32, None).expected
    kinds = {
        "gradients": ("--engine", "torch", "--max-memory", "4G"),
        "cut": ("--engine", "torch", "--max-memory", str(whole - 1000)),
        "losses": ("--engine", "onnx"),
    }
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        line = (
            "run",
            "create",
            tmp_path / "run.toml",
            "--base",
            tmp_path / "base",
            "--coordinator",
            coordinator.address,
        )
        created = edgetune(*line)
        assert created.returncode == 0, created.stderr
        clients = [
            start_client(
                coordinator.address, write_texts(tmp_path / f"{kind}.jsonl", kind), tmp_path / kind,
                "--base", str(tmp_path / "base"), *flags, name=kind,
            )
            for kind, flags in kinds.items()
        ]  # fmt: skip
        told = finished(clients)
    sent = [[e["bytes_up"] for e in events if e["event"] == "submitted" and e["kind"] == "train"] for events in told]
    assert run.directions is not None and run.directions.count == 8
    assert [len(rounds) for rounds in sent] == [2, 2, 2]
    gradients, cut, losses = (rounds[0] for rounds in sent)
    assert losses == 23 + 2 * 8 < cut and gradients != cut
    forms = {path.read_bytes()[:4] for path in (tmp_path / "store" / "blobs").rglob("*") if path.is_file()}
    assert {b"ETU1", b"ETB1", b"ETS1"} <= forms
    verified = edgetune("run", "verify", "kinds", "--store", tmp_path / "store", "--json")
    assert verified.returncode == 0 and json.loads(verified.stdout)["verified"], verified.stdout
