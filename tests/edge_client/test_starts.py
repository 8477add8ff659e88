"""Where a run begins: factors against a dense singular value decomposition, folders that peft wrote, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_client import export, starts
from edge_client.adapters import Adapter
from edge_client.adapters.bottlenecks import Bottlenecks
from edge_client.adapters.entries import WeightEntries
from edge_client.adapters.low_rank import PREFIX, LoraCore, LoraFactors
from edge_client.adapters.norms import NormGains
from edge_client.starts import Source
from quantize import QuantizedBase
from quantize.base_model import build
from tests.models import tiny_llama
from wire.delta import Layout, Vector
from wire.errors import UserError

SMALL = LoraFactors(rank=4, alpha=8.0, targets=("q_proj", "down_proj"))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> QuantizedBase:
    folder = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)
    return build(str(tiny_llama(folder / "model")), "nf4", folder / "nf4")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> QuantizedBase:
    folder = tmp_path_factory.mktemp("others")
    return build(str(tiny_llama(folder / "model", seed=1)), "nf4", folder / "nf4")


def moved(row: Adapter, base: QuantizedBase) -> tuple[Layout, Vector]:
    layout = row.layout(base)
    chance = np.random.Generator(np.random.Philox(key=3))
    return layout, row.initial(layout, 5, base) + np.float32(0.05) * chance.standard_normal(layout.size, np.float32)


def of(row: LoraFactors, layout: Layout, vector: Vector, module: str) -> Any:
    """alpha / rank · B · A, float64, from the tensors by their names."""
    named = layout.split(vector)
    a, b = (named[f"{PREFIX}{module}.lora_{part}.weight"].astype(np.float64) for part in "AB")
    return row.alpha / row.rank * (b @ a)


def begun(source: Source, row: LoraFactors, base: QuantizedBase) -> tuple[Layout, Vector, float]:
    layout = row.layout(base)
    return layout, *starts.begun(source, row, base, layout, 9)


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_a_smaller_rank_begins_as_the_nearest_of_its_rank(base: QuantizedBase, rank: int) -> None:
    before, vector = moved(SMALL, base)
    row = LoraFactors(rank=rank, alpha=3.0, targets=SMALL.targets)
    layout, made, lost = begun(starts.of_release("r", SMALL, base, vector), row, base)
    missed = whole = 0.0
    for module in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj", "model.layers.0.mlp.down_proj"):
        wanted = of(SMALL, before, vector, module)
        left, values, right = np.linalg.svd(wanted)
        nearest = (left[:, :rank] * values[:rank]) @ right[:rank]
        assert np.allclose(of(row, layout, made, module), nearest, atol=1e-5 * values[0])
    for module in SMALL.placement(base).linears:
        values = np.linalg.svd(of(SMALL, before, vector, module), compute_uv=False)
        missed, whole = missed + np.square(values[rank:]).sum(), whole + np.square(values).sum()
    assert lost == pytest.approx(np.sqrt(missed / whole), abs=1e-6)


def test_a_larger_rank_says_the_same_and_what_is_spare_can_be_learned(base: QuantizedBase) -> None:
    before, vector = moved(SMALL, base)
    row = LoraFactors(rank=7, alpha=5.0)
    layout, made, lost = begun(starts.of_release("r", SMALL, base, vector), row, base)
    assert lost < 1e-5
    named, fresh = layout.split(made), layout.split(row.initial(layout, 9, base))
    for module in row.placement(base).linears:
        a, b = (named[f"{PREFIX}{module}.lora_{part}.weight"] for part in "AB")
        wanted = (
            of(SMALL, before, vector, module)
            if module in SMALL.placement(base).linears
            else np.zeros((len(b), a.shape[1]))
        )
        assert np.allclose(of(row, layout, made, module), wanted, atol=1e-6)
        spare = ~b.any(axis=0)
        assert spare.sum() == (3 if wanted.any() else 7)
        assert np.array_equal(a[spare], fresh[f"{PREFIX}{module}.lora_A.weight"][spare])


@pytest.mark.parametrize("rank", [3, 8])
def test_after_sparse_entries_factors_begin_as_their_leading_directions(base: QuantizedBase, rank: int) -> None:
    entries = WeightEntries(density=0.05, targets=("v_proj",), seed=4)
    before, vector = moved(entries, base)
    row = LoraFactors(rank=rank, alpha=2.0, targets=("v_proj",))
    layout, made, lost = begun(starts.of_release("r", entries, base, vector), row, base)
    missed = whole = 0.0
    for (tensor, place), module in zip(before.slices(), entries.placement(base).entries, strict=True):
        wanted = np.zeros(64 * 128)
        wanted[entries.placement(base).entries[module].positions] = vector[place]
        values = np.linalg.svd(wanted.reshape(64, 128), compute_uv=False)
        away = float(np.square(of(row, layout, made, module) - wanted.reshape(64, 128)).sum())
        assert tensor.size == round(0.05 * 64 * 128) and away < 1.1 * np.square(values[rank:]).sum()
        missed, whole = missed + away, whole + np.square(values).sum()
    assert lost == pytest.approx(np.sqrt(missed / whole), abs=1e-5)


def test_the_very_same_adapter_begins_where_the_other_ended(base: QuantizedBase) -> None:
    for row in (SMALL, WeightEntries(), NormGains(), LoraCore(rank=4), Bottlenecks(width=2)):
        layout, vector = moved(row, base)
        made, lost = starts.begun(starts.of_release("r", row, base, vector), row, base, layout, 9)
        assert lost == 0 and np.array_equal(made, vector)


def test_what_aggregators_and_devices_fill_begins_as_it_would(base: QuantizedBase) -> None:
    before, vector = moved(SMALL, base)
    row = LoraFactors(rank=4, alpha=8.0, targets=SMALL.targets, history=2, keeps="pair")
    layout, made, lost = begun(starts.of_release("r", SMALL, base, vector), row, base)
    named = layout.split(made)
    assert lost < 1e-5 and not any(named[n].any() for n in named if ".lora_B.history" in n)
    for module in SMALL.placement(base).linears:
        assert np.allclose(of(row, layout, made, module), of(SMALL, before, vector, module), atol=1e-6)


def test_a_folder_that_peft_loads_begins_a_run(base: QuantizedBase, tmp_path: Path) -> None:
    before, vector = moved(SMALL, base)
    export.to_peft(base, SMALL.placement(base), before, vector, tmp_path / "out")
    row = LoraFactors(rank=4, alpha=2.0, targets=SMALL.targets)
    layout, made, lost = begun(starts.of_folder(tmp_path / "out", base), row, base)
    assert lost < 1e-5
    for module in SMALL.placement(base).linears:
        assert np.allclose(of(row, layout, made, module), of(SMALL, before, vector, module), atol=1e-6)


def written(base: QuantizedBase, out: Path, **config: Any) -> Path:
    layout, vector = moved(SMALL, base)
    export.to_peft(base, SMALL.placement(base), layout, vector, out)
    path = out / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return out


def test_a_folder_of_another_base_is_refused_by_both_names(
    base: QuantizedBase, other: QuantizedBase, tmp_path: Path
) -> None:
    folder = written(base, tmp_path / "out")
    with pytest.raises(UserError, match=f"{base.identity[:12]}.*{other.identity[:12]}"):
        starts.of_folder(folder, other)


def test_peft_scales_by_the_root_of_the_rank_where_the_folder_says_so(base: QuantizedBase, tmp_path: Path) -> None:
    plain = starts.of_folder(written(base, tmp_path / "plain"), base).changes
    rooted = starts.of_folder(written(base, tmp_path / "rooted", use_rslora=True), base).changes
    assert all(np.allclose(rooted[m](), 2 * plain[m](), atol=1e-6) for m in plain)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"peft_type": "PREFIX_TUNING"}, "not of LoRA"),
        ({"use_dora": True}, "use_dora"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"lora_alpha": "many"}, "not a number"),
    ],
)
def test_a_folder_with_more_than_factors_is_refused_by_what_it_has(
    base: QuantizedBase, tmp_path: Path, config: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        starts.of_folder(written(base, tmp_path / "out", **config), base)


def test_a_folder_that_is_none_is_refused(base: QuantizedBase, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as what peft writes"):
        starts.of_folder(tmp_path, base)


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        (SMALL, LoraFactors(targets=("q_proj",)), "does not tune; widen targets"),
        (SMALL, LoraCore(), "another adapter than this run's"),
        (SMALL, LoraFactors(tuned="B"), "another adapter than this run's"),
        (SMALL, LoraFactors(start="leading"), "without a start of its own"),
        (SMALL, LoraFactors(keeps="B"), "free and shared"),
        (NormGains(), SMALL, "no part of the weights"),
        (Bottlenecks(width=2), SMALL, "no part of the weights"),
    ],
)
def test_an_adapter_that_a_run_cannot_say_is_refused(
    base: QuantizedBase, source: Adapter, target: Adapter, said: str
) -> None:
    _, vector = moved(source, base)
    with pytest.raises(UserError, match=said):
        starts.begun(starts.of_release("r", source, base, vector), target, base, target.layout(base), 0)
