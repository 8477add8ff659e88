"""Biases and bottlenecks against plain arithmetic and against transformers, and what is said where they cannot be."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from edge_client import export
from edge_client.adapters import Adapter
from edge_client.adapters.biases import Biases
from edge_client.adapters.bottlenecks import Bottlenecks
from edge_client.engines.torch_engine import TorchEngine
from edge_client.engines.toy import ToyBase
from quantize import QuantizedBase
from quantize.base_model import build
from tests.edge_client.test_torch_engine import batch
from tests.models import tiny_llama
from wire.delta import Vector
from wire.errors import SpecError, UserError


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, QuantizedBase]:
    folder = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)
    return {
        biases: build(str(tiny_llama(folder / f"m{biases}", biases=biases)), "nf4", folder / f"nf4-{biases}")
        for biases in (True, False)
    }


def moved(row: Adapter, base: QuantizedBase) -> tuple[TorchEngine, Vector]:
    engine = TorchEngine.load(base, row, row.layout(base))
    chance = np.random.Generator(np.random.Philox(key=3))
    vector = row.initial(engine.layout, 5) + np.float32(0.1) * chance.standard_normal(engine.layout.size, np.float32)
    engine.write(vector)
    return engine, vector


def plain_loss(model: Any) -> float:
    (sequence,) = batch((32,))
    ids, labels = (torch.from_numpy(x).long()[None] for x in (sequence.ids, sequence.labels))
    with torch.no_grad():
        return float(model(input_ids=ids, labels=labels).loss)


def test_tuned_biases_merge_into_a_model_of_the_same_loss(bases: dict[bool, QuantizedBase], tmp_path: Path) -> None:
    row = Biases()
    engine, vector = moved(row, bases[True])
    export.to_merged(bases[True], row.placement(bases[True]), engine.layout, vector, tmp_path / "out")
    total, count = engine.loss(batch((32,)))
    assert total / count == pytest.approx(
        plain_loss(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")), abs=1e-5
    )


def test_a_base_without_biases_is_told_what_it_can_tune(bases: dict[bool, QuantizedBase]) -> None:
    for base in (bases[False], ToyBase()):
        with pytest.raises(SpecError, match="tune norms"):
            Biases().layout(base)


def test_the_last_layers_alone_are_laid_out(bases: dict[bool, QuantizedBase]) -> None:
    for row in (Biases(layers=1), Bottlenecks(layers=1)):
        names = [tensor.name for tensor in row.layout(bases[True]).tensors]
        assert names and all(name.startswith("model.layers.1.") for name in names)


def test_a_bottleneck_is_what_its_definition_says(bases: dict[bool, QuantizedBase]) -> None:
    row = Bottlenecks(width=3)
    engine, vector = moved(row, bases[True])
    module = "model.layers.1.mlp.down_proj"
    layer: Any = engine._model.get_submodule(module)
    x = torch.randn(2, layer.in_features, generator=torch.Generator().manual_seed(0))
    named = engine.layout.split(vector)
    down, up = (named[f"{module}.{part}.weight"].astype(np.float64) for part in ("down", "up"))
    with torch.no_grad():
        found = layer(x).double().numpy()
        layer._forward_hooks.clear()
        y = layer(x).double().numpy()
    inner = y @ down.T
    inner *= 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
    np.testing.assert_allclose(found, y + inner @ up.T, atol=1e-5)
    assert np.abs(inner @ up.T).max() > 1e-3


def test_bottlenecks_start_as_their_base(bases: dict[bool, QuantizedBase]) -> None:
    row = Bottlenecks()
    engine, _ = moved(row, bases[True])
    away = engine.loss(batch())[0]
    engine.write(row.initial(engine.layout, 1))
    plain, _ = moved(Biases(), bases[True])
    plain.write(np.zeros(plain.layout.size, np.float32))
    assert engine.loss(batch())[0] == plain.loss(batch())[0] != away


def test_a_folder_with_a_loader_of_its_own_loads_where_edgetune_is_not(
    bases: dict[bool, QuantizedBase], tmp_path: Path
) -> None:
    row = Bottlenecks(width=3)
    engine, vector = moved(row, bases[True])
    export.to_torch(bases[True], row.placement(bases[True]), engine.layout, vector, tmp_path / "out")
    (sequence,) = batch((32,))
    line = (
        "import sys; sys.modules['edge_client'] = sys.modules['wire'] = sys.modules['peft'] = None\n"
        "import load, torch\n"
        f"ids, labels = torch.tensor([{sequence.ids.tolist()}]), torch.tensor([{sequence.labels.tolist()}])\n"
        "with torch.no_grad(): print(float(load.model()(input_ids=ids, labels=labels).loss))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", line], cwd=tmp_path / "out", capture_output=True, text=True, timeout=120, check=False
    )
    total, count = engine.loss([sequence])
    assert done.returncode == 0, done.stderr
    assert total / count == pytest.approx(float(done.stdout), abs=1e-5)


def test_what_cannot_hold_an_adapter_says_which_export_can(bases: dict[bool, QuantizedBase], tmp_path: Path) -> None:
    base = bases[True]
    for row, write, can in (
        (Bottlenecks(), export.to_peft, "--to torch"),
        (Bottlenecks(), export.to_merged, "--to torch"),
        (Biases(), export.to_peft, "--to merged"),
        (Biases(), export.to_torch, "--to peft or --to merged"),
    ):
        layout = row.layout(base)
        with pytest.raises(UserError, match=can):
            write(base, row.placement(base), layout, row.initial(layout, 0), tmp_path / "out")
    assert not (tmp_path / "out").exists()
