"""Every row of ADAPTERS: its config survives, it lays out the same everywhere, and a model that it enters learns by it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from edge_client.adapters import ADAPTERS, Adapter, whole_layout
from edge_client.adapters.low_rank import LoraFactors
from edge_client.engines import Optimizer, tuned_numbers
from edge_client.engines.torch_engine import TorchEngine
from edge_client.view import View
from quantize import QuantizedBase
from quantize.base_model import build
from tests.e2e import exports
from tests.edge_client.test_torch_engine import batch
from tests.models import tiny_llama
from wire import spec
from wire.delta import Layout, Vector
from wire.portions import Portion

TABLES: dict[str, dict[str, Any]] = {
    "lora": {"id": "lora", "rank": 4},
    "lora_sb": {"id": "lora_sb", "rank": 4},
    "norms": {"id": "norms"},
    "biases": {"id": "biases"},
    "entries": {"id": "entries", "density": 0.05, "seed": 3},
    "bottleneck": {"id": "bottleneck", "width": 4},
    "prompt": {"id": "prompt", "length": 4},
    "projected_prompt": {"id": "projected_prompt", "length": 4, "dimensions": 12},
    "prefix": {"id": "prefix", "length": 3},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> QuantizedBase:
    folder = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)
    return build(str(tiny_llama(folder / "model", biases=True)), "bf16", folder / "bf16")


def row_of(name: str) -> Adapter:
    row: Adapter = spec.build(ADAPTERS, TABLES[name])
    return row


def engine(row: Adapter, base: QuantizedBase) -> TorchEngine:
    return TorchEngine.load(base, row, whole_layout(row, base))


def away(row: Adapter, layout: Layout, base: QuantizedBase) -> Vector:
    chance = np.random.Generator(np.random.Philox(key=3))
    return row.initial(layout, 5, base) + np.float32(0.05) * chance.standard_normal(layout.size, np.float32)


def test_every_row_is_tested_here() -> None:
    assert TABLES.keys() == ADAPTERS.keys()


def test_every_row_is_taken_home_from_a_real_model() -> None:
    """By `make exports`."""
    assert {case.adapter["id"] for case in exports.CASES.values()} == ADAPTERS.keys()


@pytest.mark.parametrize("name", ADAPTERS)
def test_its_config_survives_and_says_its_id(name: str) -> None:
    row = row_of(name)
    assert row.id == name and spec.build(ADAPTERS, spec.plain(row)) == row
    assert hash(row) == hash(row_of(name)), "an engine is found again by its adapter"


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_starts_with_the_same_bits_and_another_seed_lays_out_the_same(name: str, base: QuantizedBase) -> None:
    row = row_of(name)
    layout = whole_layout(row, base)
    assert layout == whole_layout(row_of(name), base)
    assert np.array_equal(row.initial(layout, 5, base), row_of(name).initial(layout, 5, base))
    assert row.initial(layout, 5, base).dtype == np.float32


@pytest.mark.parametrize("name", [*(name for name in ADAPTERS if name not in ("prompt", "prefix")), "fixed A"])
def test_a_device_of_smaller_rank_computes_what_the_first_entries_say(name: str, base: QuantizedBase) -> None:
    """Of a prompt the rest is not there: a text has no rows that say nothing."""
    row = LoraFactors(rank=4, tuned="B") if name == "fixed A" else row_of(name)
    view, layout = View(row.layout(base), rank=2), row.layout(base)
    small = away(row, layout, base)
    narrow = Portion(tuple(range(len(layout.tensors))), 2)
    cut = narrow.put(narrow.take(small, layout), layout)
    whole, narrowed = engine(row, base), engine(row.narrowed(2), base)
    assert view.layout == narrowed.layout
    found = narrowed.losses(batch(), [narrow.take(small, layout)])
    assert found == pytest.approx(whole.losses(batch(), [cut]), abs=1e-5)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_tuned_tensor_changes_the_loss(name: str, base: QuantizedBase) -> None:
    row = row_of(name)
    one = engine(row, base)
    vector = away(row, one.layout, base)
    before = one.losses(batch(), [vector])[0]
    moved = []
    for _, place in one.layout.slices():
        other = vector.copy()
        other[place] += 0.2
        moved.append(other)
    assert np.abs(one.losses(batch(), moved) - before).min() > 1e-6


@pytest.mark.parametrize("name", ADAPTERS)
def test_its_gradient_is_that_of_finite_differences(name: str, base: QuantizedBase) -> None:
    row = row_of(name)
    one = engine(row, base)
    vector, rate = away(row, one.layout, base), np.float32(1e-2)
    one.write(vector)
    one.start(Optimizer(id="sgd", clip_norm=1e9))
    one.step(batch(), float(rate))
    gradient = (vector - one.read()) / rate
    for number, (_, place) in enumerate(one.layout.slices()):
        assert gradient[place].any() == (number in tuned_numbers(one.layout))
    shift = np.float32(3e-3 / np.linalg.norm(gradient)) * gradient
    above, below = one.losses(batch(), [vector + shift, vector - shift])
    assert (above - below) / 6e-3 == pytest.approx(np.linalg.norm(gradient), rel=0.03)


@pytest.mark.parametrize("name", ADAPTERS)
def test_steps_make_the_loss_smaller(name: str, base: QuantizedBase) -> None:
    row = row_of(name)
    one = engine(row, base)
    one.write(row.initial(one.layout, 5, base))
    before = one.loss(batch())[0]
    one.start(Optimizer())
    for _ in range(5):
        one.step(batch(), 2e-2)
    assert one.loss(batch())[0] < before - 0.5


@pytest.mark.parametrize("name", ADAPTERS)
def test_it_can_answer(name: str, base: QuantizedBase) -> None:
    row = row_of(name)
    one = engine(row, base)
    one.write(away(row, one.layout, base))
    answer = one.generate("Hello", 8, 0.0, 0, raw=True)
    assert answer == one.generate("Hello", 8, 0.0, 1, raw=True)
