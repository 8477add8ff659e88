"""The layers below the lowest tuned one: computed once a sequence, kept within their bytes, and never out of date."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edge_client.adapters import Adapter, whole_layout
from edge_client.adapters.bottlenecks import Bottlenecks
from edge_client.adapters.low_rank import LoraFactors
from edge_client.adapters.norms import NormGains
from edge_client.engines import Optimizer, Tokens, cuts, torch_cut
from edge_client.engines.torch_engine import TorchEngine
from edge_client.engines.torch_lower import Lower
from quantize import QuantizedBase
from quantize.base_model import build
from tests.edge_client.test_torch_engine import batch
from tests.models import tiny_llama
from wire.delta import Vector

ROWS: dict[str, Adapter] = {
    "lora": LoraFactors(rank=4, layers=1),
    "bottleneck": Bottlenecks(width=4, layers=1),
    "norms": NormGains(layers=1),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> QuantizedBase:
    folder = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)
    return build(str(tiny_llama(folder / "model")), "nf4", folder / "nf4")


def loaded(row: Adapter, base: QuantizedBase, limit: int | None = None) -> TorchEngine:
    return TorchEngine.load(base, row, whole_layout(row, base), limit)


def vector(engine: TorchEngine, seed: int = 3) -> Vector:
    chance = np.random.Generator(np.random.Philox(key=seed))
    return chance.standard_normal(engine.layout.size, np.float32) * np.float32(0.05)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The layer at the end of each pass through lower layers."""
    made: list[int] = []
    entering = torch_cut.entering

    def counted(body: Any, cut: cuts.Cut, given: dict[str, Any]) -> Any:
        made.extend([cut.layer] if cut.layer else [])
        return entering(body, cut, given)

    monkeypatch.setattr(torch_cut, "entering", counted)
    return made


def trained(engine: TorchEngine, sequences: list[Tokens], epochs: int = 3) -> tuple[list[float], Vector]:
    engine.write(vector(engine))
    engine.start(Optimizer())
    losses = [engine.step(some, 1e-2) for _ in range(epochs) for some in (sequences[:2], sequences[2:], sequences[1:3])]
    return losses, engine.read()


@pytest.mark.parametrize("name", ROWS)
def test_losses_and_steps_are_the_same_bit_for_bit_with_and_without_what_is_kept(
    base: QuantizedBase, name: str, passes: list[int]
) -> None:
    sequences = batch()
    keeping, forgetful = loaded(ROWS[name], base), loaded(ROWS[name], base)
    losses, adapter = trained(keeping, sequences)
    assert passes == [1] * len(sequences), "once a sequence"
    forgetful._fit(sequences)
    forgetful._lower = Lower(forgetful._body, 1, 0)
    others, other = trained(forgetful, sequences)
    assert len(passes) == len(sequences) + 18
    assert losses == others and np.array_equal(adapter, other)
    assert losses[-3] < losses[0]


@pytest.mark.parametrize("name", ROWS)
def test_a_step_is_that_of_the_whole_model(base: QuantizedBase, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stepped() -> tuple[float, Vector]:
        engine = loaded(ROWS[name], base)
        engine.write(vector(engine))
        engine.start(Optimizer(id="sgd", clip_norm=1e9))
        return engine.step(batch(), 0.1), engine.read() - vector(engine)

    loss, moved = stepped()
    monkeypatch.setattr(TorchEngine, "keeps", False)
    whole, other = stepped()
    assert loss == pytest.approx(whole, rel=1e-4)
    assert np.linalg.norm(moved - other) < 0.02 * np.linalg.norm(other)


def test_nothing_is_kept_of_what_a_new_adapter_changes_below(base: QuantizedBase, passes: list[int]) -> None:
    """In a round in which only the upper layers are tuned, another release brings other lower ones."""
    row = LoraFactors(rank=4)
    engine = loaded(row, base)
    upper = [n for n, tensor in enumerate(engine.layout.tensors) if ".layers.1." in tensor.name]
    sequences, losses = batch(), []
    for seed in (3, 3, 4):
        engine.write(vector(engine, seed))
        engine.start(Optimizer(), upper)
        losses.append(engine.step(sequences, 0.0))
    assert losses[0] == losses[1] != losses[2]
    assert len(passes) == 2 * len(sequences)
    fresh = loaded(row, base)
    fresh.write(vector(fresh, 4))
    fresh.start(Optimizer(), upper)
    assert fresh.step(batch(), 0.0) == losses[2]


def test_it_is_kept_within_what_the_memory_leaves(base: QuantizedBase, passes: list[int]) -> None:
    free = loaded(ROWS["lora"], base)
    one = 32 * 128 * 4
    limited = loaded(ROWS["lora"], base, free.expected_memory(2, 32).expected + one)
    trained(limited, batch())
    assert limited._lower is not None and limited._lower._kept._bytes <= one
    assert len(batch()) < len(passes) < len(batch()) + 18


def test_layers_below_need_no_memory_for_gradients(base: QuantizedBase) -> None:
    upper, whole = loaded(ROWS["lora"], base), loaded(LoraFactors(rank=4), base)
    assert upper.expected_memory(64, 512).expected < 0.9 * whole.expected_memory(64, 512).expected


def test_the_lowest_tuned_layer_is_found_among_those_that_are_tuned(base: QuantizedBase) -> None:
    layout = NormGains().layout(base)
    final = [n for n, tensor in enumerate(layout.tensors) if tensor.name == "model.norm.gain"]
    assert cuts.lowest(layout, range(len(layout.tensors)), 2) == 0
    assert cuts.lowest(layout, final, 2) == 1
