from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edge_client.choosing import STEEPEST, chosen, steepest
from edge_client.data import Example
from edge_client.engines.torch_engine import TorchEngine
from experiments.simulation import Simulation
from quantize import QuantizedBase
from quantize.base_model import build
from tests.models import tiny_llama
from wire import run_spec
from wire.delta import Layout, Tensor
from wire.portions import Part, Portion

LAYOUT = Layout(tuple(Tensor(f"layers.{n}.{part}", (3,)) for n in range(3) for part in "ab"))
GRADIENT = np.array([0, 0, 2, 0, 0, 2, 1, 1, 1, 1, 1, 1, 3, 0, 0, 0, 0, 0], np.float32)
"""Squares by layer: 8, 6, 9."""


def test_the_layers_of_the_longest_gradients_are_kept_whole_and_in_order() -> None:
    whole = Portion(tuple(range(6)))
    assert steepest(LAYOUT, whole, GRADIENT, 1).chosen == (4, 5)
    assert steepest(LAYOUT, whole, GRADIENT, 2).chosen == (0, 1, 4, 5)
    assert steepest(LAYOUT, Portion((0, 2, 3), 2), GRADIENT, 1) == Portion((2, 3), 2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> QuantizedBase:
    folder: Path = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)
    return build(str(tiny_llama(folder / "model")), "bf16", folder / "bf16")


def simulation(base: QuantizedBase) -> Simulation:
    table = {
        "name": "s",
        "base": {"model": "tiny", "format": "bf16"},
        "rounds": 9,
        "cohort": {"goal": 2},
        "codec": "float32",
        "method": {"id": "lora", "rank": 4, "local_steps": 4, "batch": 2, "sequence_length": 32, "learning_rate": 0.02},
        "portions": {"id": "chosen", "layers": 1},
    }
    return Simulation(run_spec.parse(table), base, TorchEngine, 1, None)


def test_a_devices_text_chooses_the_layer_in_which_its_loss_changes_most(base: QuantizedBase) -> None:
    run = simulation(base)
    text = run.engine.tokenize([Example("one two three " * 20)], 32)[:2]
    chance = np.random.Generator(np.random.Philox(key=1))
    start = run.adapter + np.float32(0.02) * chance.standard_normal(run.layout.size, np.float32)
    view = run.view_of("a")
    found = chosen(view, view.portion(1, "a"), run.engine, start, text)
    assert found is not None
    run.engine.write(start)
    run.engine.start(STEEPEST)
    run.engine.step(text, 1.0)
    gradient, slopes = run.engine.read() - start, {}
    for layer in (0, 1):
        here = [place for t, place in run.layout.slices() if f"layers.{layer}." in t.name]
        along = np.zeros_like(start)
        for place in here:
            along[place] = gradient[place]
        along /= np.linalg.norm(along)
        up, down = run.engine.losses(text, [start + np.float32(0.02) * along, start - np.float32(0.02) * along])
        slopes[layer] = abs(up - down)
    steepest_layer = max(slopes, key=lambda layer: slopes[layer])
    assert {f"layers.{steepest_layer}." in run.layout.tensors[n].name for n in found.chosen} == {True}


def test_a_federation_of_devices_that_choose_learns_and_each_sends_one_layer(base: QuantizedBase) -> None:
    run = simulation(base)
    texts = {d: run.engine.tokenize([Example(f"{d} says {d} and {d}. " * 20)] * 2, 32) for d in ("a", "b")}
    every = [s for text in texts.values() for s in text]
    before = run.engine.losses(every, [run.adapter])[0]
    sent = run.rules.read(run.payload_of("a", texts["a"]))
    assert isinstance(sent, Part) and len(sent.portion.chosen) == len(run.layout.tensors) // 2
    for _ in range(4):
        run.round(texts)
    assert run.engine.losses(every, [run.adapter])[0] < before - 0.1
