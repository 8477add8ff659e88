from __future__ import annotations

import json
from pathlib import Path

from edge_client import doctor
from quantize.base_model import build
from tests.models import tiny_llama
from tests.processes import CoordinatorProcess, edgetune, write_toy_spec
from wire import run_spec

SPEC = """\
name = "judged"
rounds = 1
[base]
model = "{model}"
format = "nf4"
[cohort]
goal = 1
[method]
id = "lora"
rank = 2
batch = 2
sequence_length = 32
"""


def test_doctor_measures_a_real_step_and_says_what_would_travel(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    (tmp_path / "run.toml").write_text(SPEC.format(model=model))
    made = edgetune("quantize", model, "--format", "nf4", "--out", tmp_path / "base")
    assert made.returncode == 0, made.stderr
    done = edgetune("client", "doctor", "--spec", tmp_path / "run.toml", "--base", tmp_path / "base", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["picked"]["engine"] == "torch"
    assert told["measured"]["step_s"] > 0
    assert told["measured"]["peak_memory"] > 100 << 20
    assert told["traffic"]["float32"] == 4 * told["picked"]["adapter_parameters"]
    assert 8 < told["traffic"]["float32"] / told["traffic"]["up"] < 32


def test_doctor_says_what_is_missing_when_memory_is_too_little(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    (tmp_path / "run.toml").write_text(SPEC.format(model=model))
    edgetune("quantize", model, "--format", "nf4", "--out", tmp_path / "base")
    line = ("--spec", tmp_path / "run.toml", "--base", tmp_path / "base", "--quick", "--max-memory", "64M")
    done = edgetune("client", "doctor", *line)
    assert done.returncode == 1
    assert "picked       nothing" in done.stdout
    assert "is the least" in done.stdout


def test_doctor_judges_the_toy_too(tmp_path: Path) -> None:
    done = edgetune("client", "doctor", "--spec", write_toy_spec(tmp_path / "toy.toml"))
    assert done.returncode == 0, done.stderr
    assert "engine toy" in done.stdout
    assert "20,5" in done.stdout


FORWARD = """
name = "judged"
rounds = 1
[base]
model = "{model}"
format = "int4-onnx"
[cohort]
goal = 1
[method]
id = "decomfl"
local_steps = 16
batch = 2
sequence_length = 32
[method.adapter]
id = "norms"
"""


def test_doctor_takes_onnx_for_a_run_that_needs_losses_alone_and_times_the_link(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model")
    (tmp_path / "run.toml").write_text(FORWARD.format(model=model))
    made = edgetune("quantize", model, "--format", "int4-onnx", "--out", tmp_path / "base")
    assert made.returncode == 0, made.stderr
    line = ("--spec", tmp_path / "run.toml", "--base", tmp_path / "base")
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        done = edgetune("client", "doctor", *line, "--coordinator", coordinator.address, "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["picked"]["engine"], told["picked"]["method"]) == ("onnx", "decomfl")
    assert told["traffic"]["up"] == 23 + 2 * 16
    assert told["measured"]["step_s"] > 0
    assert 0 < told["link"]["round_trip_s"] < 5


def test_doctor_falls_back_to_losses_where_memory_is_too_little_for_gradients() -> None:
    run, why = doctor.suited("auto", 500 << 20)
    assert run.method["id"] == "mezo" and "too few for gradients" in why
    assert doctor.suited("auto", 4 << 30)[0].method["id"] == "lora"


def test_doctor_says_in_how_many_layers_a_device_has_gradients_and_steps_so(tmp_path: Path) -> None:
    base = build(str(tiny_llama(tmp_path / "model")), "int4-onnx", tmp_path / "base")
    method = {"id": "hybrid", "rank": 4, "batch": 2, "sequence_length": 16, "local_steps": 2}
    run = run_spec.parse(
        {
            "name": "judged",
            "base": {"model": "tiny", "format": "int4-onnx"},
            "rounds": 1,
            "cohort": {"goal": 1},
            "method": method,
        }
    )
    roomy = doctor.examine(run, "torch", base.folder, 4 << 30, 1, measure=False).picked
    assert roomy is not None and roomy.gradient_layers == 2 and roomy.expected_memory is not None
    tight = doctor.examine(run, "torch", base.folder, roomy.expected_memory - 1000, 1, measure=True)
    assert tight.picked is not None and tight.picked.gradient_layers == 1
    assert tight.measured is not None and tight.measured.step_s > 0
    assert "gradients in the last 1 layers, losses alone in those below" in doctor.text(tight)
