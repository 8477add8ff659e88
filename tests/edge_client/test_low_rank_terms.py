"""Several low-rank terms a layer: history, what a device keeps, and a start from the weight, against dense arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from edge_client import export
from edge_client.adapters import whole_layout
from edge_client.adapters.low_rank import PREFIX, LoraFactors, leading
from edge_client.engines import Optimizer, tuned_numbers
from edge_client.engines.torch_engine import TorchEngine
from edge_client.engines.toy import ToyBase, ToyEngine
from quantize import QuantizedBase
from quantize.base_model import build
from tests.edge_client.test_torch_engine import batch
from tests.models import tiny_llama
from wire import run_spec, spec
from wire.delta import HISTORY, Vector
from wire.errors import SpecError

ROWS = {
    "history": LoraFactors(rank=4, alpha=8.0, history=6),
    "keeps-B": LoraFactors(rank=4, alpha=8.0, keeps="B", targets=("q_proj", "down_proj")),
    "keeps-pair": LoraFactors(rank=4, alpha=8.0, keeps="pair", layers=1),
    "B-history-pair": LoraFactors(rank=4, alpha=8.0, tuned="B", history=2, keeps="pair"),
    "leading": LoraFactors(rank=4, alpha=4.0, start="leading"),
    "everything": LoraFactors(rank=4, alpha=8.0, start="leading", history=3, keeps="B"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> QuantizedBase:
    folder = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)
    return build(str(tiny_llama(folder / "model")), "bf16", folder / "bf16")


def moved(row: LoraFactors, base: QuantizedBase) -> Vector:
    layout = whole_layout(row, base)
    chance = np.random.Generator(np.random.Philox(key=3))
    return row.initial(layout, 5, base) + np.float32(0.05) * chance.standard_normal(layout.size, np.float32)


def torch_engine(row: LoraFactors, base: QuantizedBase) -> TorchEngine:
    return TorchEngine.load(base, row, whole_layout(row, base))


def dense(row: LoraFactors, base: QuantizedBase, vector: Vector, module: str) -> Any:
    """The weight as its definition says it, in float64, from the tensors by their names."""
    named = whole_layout(row, base).split(vector)
    weight = base.dequantized(f"{module}.weight").astype(np.float64)
    for kind in ("", ".history", ".personal"):
        b = named.get(f"{PREFIX}{module}.lora_B{kind}.weight")
        a = named.get(f"{PREFIX}{module}.lora_A{kind}.weight")
        if b is not None and a is not None:
            weight += row.alpha / row.rank * b.astype(np.float64) @ a.astype(np.float64)
    if row.start == "leading":
        a, b = leading(base.dequantized(f"{module}.weight"), row.rank)
        weight -= row.alpha / row.rank * b.astype(np.float64) @ a.astype(np.float64)
    return weight


@pytest.mark.parametrize("name", [n for n in ROWS if ROWS[n].tuned == "A and B"])
def test_a_merged_weight_is_the_base_and_all_its_terms(base: QuantizedBase, name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    vector = moved(row, base)
    export.to_merged(base, row.placement(base), whole_layout(row, base), vector, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    for module in row.placement(base).linears:
        np.testing.assert_allclose(found[f"{module}.weight"], dense(row, base, vector, module), atol=2e-6)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("to", ["peft", "merged"])
def test_what_is_exported_has_the_loss_that_the_engine_finds(
    base: QuantizedBase, name: str, to: str, tmp_path: Path
) -> None:
    import peft
    import transformers

    row = ROWS[name]
    engine, vector = torch_engine(row, base), moved(row, base)
    engine.write(vector)
    sequence = batch((32,))[0]
    total, count = engine.loss([sequence])
    write = {"peft": export.to_peft, "merged": export.to_merged}[to]
    write(base, row.placement(base), engine.layout, vector, tmp_path / "out")
    plain = tmp_path / "out" / "base" if to == "peft" else tmp_path / "out"
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(plain)
    model = peft.PeftModel.from_pretrained(model, str(tmp_path / "out")) if to == "peft" else model
    ids, labels = (torch.from_numpy(x).long()[None] for x in (sequence.ids, sequence.labels))
    with torch.no_grad():
        assert total / count == pytest.approx(float(model(input_ids=ids, labels=labels).loss), abs=1e-5)


@pytest.mark.parametrize("name", ROWS)
def test_it_starts_as_its_base(base: QuantizedBase, name: str) -> None:
    row = ROWS[name]
    engine = torch_engine(row, base)
    engine.write(row.initial(engine.layout, 5, base))
    plain = TorchEngine.load(base, LoraFactors(rank=1), LoraFactors(rank=1).layout(base))
    assert engine.loss(batch())[0] == pytest.approx(plain.loss(batch())[0], rel=1e-5)
    engine.write(moved(row, base))
    assert abs(engine.loss(batch())[0] - plain.loss(batch())[0]) > 1e-2


@pytest.mark.parametrize("name", ROWS)
def test_its_gradient_is_that_of_finite_differences(base: QuantizedBase, name: str) -> None:
    row = ROWS[name]
    engine, vector = torch_engine(row, base), moved(row, base)
    rate, tuned = np.float32(1e-2), np.zeros(engine.layout.size, bool)
    for number in tuned_numbers(engine.layout):
        tuned[list(engine.layout.slices())[number][1]] = True
    engine.write(vector)
    engine.start(Optimizer(id="sgd", clip_norm=1e9))
    engine.step(batch(), float(rate))
    gradient = (vector - engine.read()) / rate
    assert not gradient[~tuned].any() and gradient[tuned].any()
    shift = np.float32(3e-3 / np.linalg.norm(gradient)) * gradient
    above, below = engine.losses(batch(), [vector + shift, vector - shift])
    assert (above - below) / 6e-3 == pytest.approx(np.linalg.norm(gradient), rel=0.03)


def test_the_shared_start_is_the_same_with_and_without_what_a_device_keeps(base: QuantizedBase) -> None:
    for row in ROWS.values():
        shared = row.initial(row.layout(base), 5, base)
        assert np.array_equal(row.initial(whole_layout(row, base), 5, base)[: len(shared)], shared)


def test_what_a_device_keeps_is_not_in_what_it_shares(base: QuantizedBase) -> None:
    kept, pair = ROWS["keeps-B"], ROWS["keeps-pair"]
    assert {t.role for t in kept.layout(base).tensors} == {"lora_A"}
    personal = kept.personal(base)
    assert personal is not None and {t.role for t in personal.tensors} == {"lora_B"}
    own = pair.personal(base)
    assert own is not None and own.size == pair.layout(base).size
    assert ROWS["history"].personal(base) is None


def test_a_history_is_of_roles_that_nobody_tunes(base: QuantizedBase) -> None:
    layout = ROWS["history"].layout(base)
    past = [t for t in layout.tensors if t.role in HISTORY]
    assert len(past) == 2 * len(base.linears()) and {min(t.shape) for t in past} == {6}
    assert len(tuned_numbers(layout)) == len(layout.tensors) - len(past)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_only_the_chosen_tensors_move(base: QuantizedBase, kind: Any) -> None:
    row = LoraFactors(rank=3, alpha=6.0, history=2, keeps="pair")
    toy = ToyEngine.load(ToyBase(), row, whole_layout(row, ToyBase()))
    chance = np.random.Generator(np.random.Philox(key=2))
    for engine in (toy, torch_engine(row, base)):
        vector = chance.standard_normal(engine.layout.size, np.float32) * np.float32(0.1)
        for chosen in ([1], None):
            engine.write(vector)
            engine.start(Optimizer(id=kind, weight_decay=0.1), chosen)
            engine.step(batch((20,)), 1e-2)
            changed = [bool((engine.read() != vector)[place].any()) for _, place in engine.layout.slices()]
            assert changed == [n in tuned_numbers(engine.layout, chosen) for n in range(len(changed))]


def test_the_toy_adds_its_terms_up() -> None:
    row = LoraFactors(rank=3, alpha=6.0, history=2, keeps="pair")
    layout = whole_layout(row, ToyBase())
    toy = ToyEngine.load(ToyBase(), row, layout)
    at = np.random.Generator(np.random.Philox(key=2)).standard_normal(layout.size, np.float32) * np.float32(0.2)
    toy.write(at)
    named = [part.astype(np.float64) for part in layout.split(at).values()]
    logits: Any = 2.0 * sum(named[n + 1] @ named[n] for n in (0, 2, 4))
    (tokens,) = batch((20,))
    learned = np.flatnonzero(tokens.labels[1:] >= 0)
    columns = logits[:, tokens.ids[learned]]
    nll = np.log(np.exp(columns).sum(axis=0)) - columns[tokens.ids[learned + 1], np.arange(len(learned))]
    assert toy.loss([tokens])[0] == pytest.approx(nll.sum(), rel=1e-5)


def test_a_start_from_the_weights_needs_them(base: QuantizedBase) -> None:
    row = ROWS["leading"]
    with pytest.raises(SpecError, match="the base is needed"):
        row.initial(row.layout(base), 5)
    with pytest.raises(SpecError, match="weights are zero"):
        row.layout(ToyBase())


def test_rows_that_say_none_of_this_keep_their_names() -> None:
    assert set(spec.plain(LoraFactors())) == {"id", "rank", "alpha", "targets", "layers", "tuned", "seed"}
    assert spec.edition(LoraFactors(history=4)) == run_spec.EDITION


@pytest.mark.parametrize("wrong", [{"history": 0}, {"tuned": "B", "keeps": "B"}, {"tuned": "B", "start": "leading"}])
def test_what_does_not_go_together_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"history|keeps"):
        LoraFactors(**wrong)
