"""Single entries of weights against the dense weights that they make, and where they stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch.nn import functional

from edge_client import export
from edge_client.adapters.entries import WeightEntries, drawn
from edge_client.engines import Optimizer
from edge_client.engines.onnx_engine import OnnxEngine
from edge_client.engines.torch_engine import TorchEngine
from edge_client.engines.toy import ToyBase, ToyEngine
from quantize import QuantizedBase
from quantize.base_model import build
from tests.edge_client.test_torch_engine import batch
from tests.models import tiny_llama
from wire.delta import Vector
from wire.errors import SpecError, UserError

ROW = WeightEntries(density=0.03, seed=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> QuantizedBase:
    folder = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)
    return build(str(tiny_llama(folder / "model")), "nf4", folder / "nf4")


def moved(base: QuantizedBase) -> Vector:
    size = ROW.layout(base).size
    return np.float32(0.05) * np.random.Generator(np.random.Philox(key=3)).standard_normal(size, np.float32)


def test_one_entry_of_each_stretch_is_drawn_and_the_same_everywhere() -> None:
    found = drawn(np.random.Philox(key=1), 1003, 10)
    ends = [n * 1003 // 10 for n in range(11)]
    assert all(low <= n < high for n, low, high in zip(found, ends, ends[1:], strict=False))
    assert found.tolist() == [87, 155, 238, 382, 445, 554, 685, 767, 813, 937]


def test_layouts_have_a_density_of_each_weight_and_positions_ascend(base: QuantizedBase) -> None:
    for tensor, (module, shape) in zip(ROW.layout(base).tensors, base.linears().items(), strict=True):
        positions = ROW.placement(base).entries[module].positions
        assert tensor.size == len(positions) == round(0.03 * shape[0] * shape[1])
        assert (np.diff(positions) > 0).all() and positions[-1] < shape[0] * shape[1]


def test_losses_and_gradients_are_those_of_the_dense_weights(base: QuantizedBase, tmp_path: Path) -> None:
    layout, vector = ROW.layout(base), moved(base)
    export.to_merged(base, ROW.placement(base), layout, vector, tmp_path / "merged")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    total: Any = 0.0
    targets = sum(sequence.targets for sequence in batch())
    for sequence in batch():
        logits = model(torch.tensor(sequence.ids[None]).long()).logits[0, :-1]
        total = total + functional.cross_entropy(
            logits, torch.tensor(sequence.labels[1:]).long(), ignore_index=-100, reduction="sum"
        )
    (total / targets).backward()
    engine = TorchEngine.load(base, ROW, layout)
    engine.write(vector)
    assert engine.loss(batch())[0] == pytest.approx(total.item(), rel=1e-4)
    engine.start(Optimizer(id="sgd", clip_norm=1e9))
    engine.step(batch(), 1.0)
    change = layout.split(vector - engine.read())
    for name, module in zip(change, base.linears(), strict=True):
        dense = model.get_submodule(module).weight.grad.numpy().reshape(-1)
        wanted = dense[ROW.placement(base).entries[module].positions]
        assert np.linalg.norm(change[name] - wanted) < 0.05 * np.linalg.norm(wanted)  # frozen layers train in bfloat16


def test_the_merged_weights_differ_at_these_entries_alone(base: QuantizedBase, tmp_path: Path) -> None:
    layout, vector = ROW.layout(base), moved(base)
    export.to_merged(base, ROW.placement(base), layout, vector, tmp_path / "merged")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for (_, place), (module, part) in zip(layout.slices(), ROW.placement(base).entries.items(), strict=True):
        found = model.get_submodule(module).weight.detach().numpy() - base.dequantized(f"{module}.weight")
        assert np.flatnonzero(found).tolist() == part.positions.tolist()
        assert np.allclose(found.reshape(-1)[part.positions], vector[place], atol=1e-6)


def test_what_cannot_tune_or_say_single_entries_tells_so(base: QuantizedBase, tmp_path: Path) -> None:
    whole = build(str(tiny_llama(tmp_path / "model")), "int4-onnx", tmp_path / "q")
    with pytest.raises(SpecError, match="no single entries"):
        OnnxEngine.load(whole, ROW, ROW.layout(whole))
    with pytest.raises(SpecError, match="low-rank factors alone"):
        ToyEngine.load(ToyBase(), ROW, ROW.layout(ToyBase()))
    with pytest.raises(UserError, match="--to merged"):
        export.to_peft(base, ROW.placement(base), ROW.layout(base), moved(base), tmp_path / "out")
