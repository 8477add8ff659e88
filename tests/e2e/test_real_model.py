"""The real model, end to end: SmolLM2-135M-Instruct, two clients, one short round, and what a person takes home."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client import data
from edge_client.engines.text import Text
from edge_client.transport import Connection
from quantize import QuantizedBase, cached_base
from tests.processes import CoordinatorProcess, edgetune, environment, finished, start_client
from wire.messages import RunStatus

FRACTION, LENGTH = 0.25, 48
SPEC = f"""\
name = "real"
rounds = 1
codec = "top_k_int4"
[base]
model = "smollm2-135m"
format = "nf4"
[cohort]
goal = 2
minimum = 2
[method]
id = "lora"
rank = 4
local_steps = 2
batch = 2
sequence_length = {LENGTH}
learning_rate = 2e-3
[evaluation]
fraction = {FRACTION}
max_sequences = 2
"""
PARITY = """\
import json, sys
import peft, torch, transformers
folder, sequences = sys.argv[1], json.load(open(sys.argv[2]))
model = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(folder + "/base"), folder)
total = count = 0
for ids in sequences:
    given = torch.tensor([ids])
    with torch.no_grad():
        total += float(model(input_ids=given, labels=given).loss) * (len(ids) - 1)
    count += len(ids) - 1
unwanted = [m for m in sys.modules if m.split(".")[0] in ("edgetune", "edge_client", "wire", "quantize")]
print(json.dumps({"loss": total / count, "count": count, "unwanted": unwanted}))
"""


def texts(path: Path, subject: str) -> Path:
    lines = [
        f"The {subject} of day {n} was recorded by the night watch, who wrote it down in full. " * 4 for n in range(8)
    ]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def base() -> QuantizedBase:
    return cached_base("smollm2-135m", "nf4")


@pytest.fixture(scope="module")
def federation(base: QuantizedBase, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("real")
    (folder / "spec.toml").write_text(SPEC)
    with CoordinatorProcess(folder / "store") as coordinator:
        made = edgetune("run", "create", folder / "spec.toml", "--coordinator", coordinator.address)
        assert made.returncode == 0, made.stderr
        clients = [
            start_client(coordinator.address, texts(folder / f"{who}.jsonl", who), folder / who, name=who)
            for who in ("weather", "harvest")
        ]
        finished(clients, timeout_s=170.0)
        yield coordinator.address, folder


def status(address: str) -> RunStatus:
    with Connection(address) as connection:
        return connection.status("real")


def held_out(base: QuantizedBase, folder: Path) -> list[list[int]]:
    """The very sequences that the clients measured."""
    text = Text(base.folder)
    kept: list[list[int]] = []
    for who in ("weather", "harvest"):
        _, examples = data.split(data.read(folder / f"{who}.jsonl"), FRACTION, 0)
        kept += [tokens.ids.tolist() for tokens in text.sequences(examples, LENGTH)[:2]]
    return kept


@pytest.mark.timeout(240)
def test_one_round_makes_the_real_model_better_and_updates_are_small(federation: tuple[str, Path]) -> None:
    ended = status(federation[0])
    first, last = ended.releases
    assert ended.state == "done"
    assert (last.held_out_loss or 9.0) < (first.held_out_loss or 0.0) - 0.05
    assert 2 * 4 * ended.parameters / last.bytes_up > 8


@pytest.mark.timeout(240)
def test_the_exported_adapter_gives_the_releases_loss_in_plain_transformers_and_peft(
    federation: tuple[str, Path], base: QuantizedBase, tmp_path: Path
) -> None:
    address, folder = federation
    done = edgetune("run", "export", "real", "--to", "peft", tmp_path / "adapter", "--coordinator", address)
    assert done.returncode == 0, done.stderr
    (tmp_path / "sequences.json").write_text(json.dumps(held_out(base, folder)))
    theirs: dict[str, Any] = json.loads(
        subprocess.run(
            [sys.executable, "-c", PARITY, str(tmp_path / "adapter"), str(tmp_path / "sequences.json")],
            capture_output=True, text=True, check=True, env=environment(), cwd=tmp_path,
        ).stdout.splitlines()[-1]
    )  # fmt: skip
    release = status(address).releases[-1]
    assert theirs["unwanted"] == []
    assert theirs["count"] == release.held_out_tokens
    assert theirs["loss"] == pytest.approx(release.held_out_loss, abs=1e-3)


@pytest.mark.timeout(240)
def test_the_release_can_be_computed_again_from_the_stored_updates(federation: tuple[str, Path]) -> None:
    done = edgetune("run", "verify", "real", "--store", federation[1] / "store")
    assert done.returncode == 0, done.stdout + done.stderr
    assert status(federation[0]).releases[-1].digest in done.stdout


@pytest.mark.timeout(240)
def test_generate_answers_with_the_newest_adapter(federation: tuple[str, Path]) -> None:
    line = ("--run", "real", "--coordinator", federation[0], "--max-new-tokens", "8", "--json")
    done = edgetune("client", "generate", "What is the capital of France?", *line)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["release"] == 1
    assert told["answer"].strip()


def test_the_built_in_models_weights_are_those_of_its_gguf_file(base: QuantizedBase) -> None:
    """q and k come back in Hugging Face's row order: the model predicts English far better than chance."""
    assert base.linears()["model.layers.0.self_attn.q_proj"] == (576, 576)
    assert base.linears()["model.layers.0.self_attn.k_proj"] == (192, 576)
    assert len(base.linears()) == 7 * 30
    assert np.isfinite(base.dequantized("model.norm.weight")).all()


def test_digits_are_split_as_the_model_was_trained(base: QuantizedBase) -> None:
    text = Text(base.folder)
    assert [text.decoded([i]) for i in text.ids("2026")] == ["2", "0", "2", "6"]
