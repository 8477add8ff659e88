"""Soft prompts and prefixes: what they start as, what peft makes of them, and where they cannot be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from edge_client import export
from edge_client.adapters import Adapter
from edge_client.adapters.low_rank import LoraFactors
from edge_client.adapters.prompts import COMMON, USUAL, PrefixKeys, ProjectedPrompt, SoftPrompt, start_tokens
from edge_client.engines import IGNORE, Tokens
from edge_client.engines.onnx_engine import OnnxEngine
from edge_client.engines.torch_engine import TorchEngine
from edge_client.engines.torch_memory import Plan
from edge_client.engines.toy import ToyBase
from quantize import QuantizedBase
from quantize.base_model import build
from tests.edge_client.test_torch_engine import batch
from tests.models import tiny_llama
from wire.delta import Vector
from wire.errors import SpecError, UserError

ROWS: dict[str, Adapter] = {
    "prompt": SoftPrompt(length=5),
    "projected_prompt": ProjectedPrompt(length=5, dimensions=12),
    "prefix": PrefixKeys(length=4),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> QuantizedBase:
    folder = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)
    return build(str(tiny_llama(folder / "model")), "bf16", folder / "bf16")


def loaded(row: Adapter, base: QuantizedBase) -> TorchEngine:
    return TorchEngine.load(base, row, row.layout(base))


def moved(engine: TorchEngine) -> Vector:
    chance = np.random.Generator(np.random.Philox(key=3))
    return np.float32(0.1) * chance.standard_normal(engine.layout.size, np.float32)


def after(tokens: tuple[int, ...], sequence: Tokens) -> Tokens:
    """The sequence with `tokens` before it, which have no loss, nor has the text's first token."""
    labels = sequence.labels.copy()
    labels[0] = IGNORE
    return Tokens(
        np.concatenate([np.array(tokens, np.int32), sequence.ids]),
        np.concatenate([np.full(len(tokens), IGNORE, np.int32), labels]),
    )


@pytest.mark.parametrize("name", ROWS)
def test_it_starts_as_tokens_before_the_text(base: QuantizedBase, name: str) -> None:
    row: Any = ROWS[name]
    engine, plain = loaded(row, base), loaded(LoraFactors(rank=1), base)
    plain.write(np.zeros(plain.layout.size, np.float32))
    engine.write(row.initial(engine.layout, 0))
    tokens = start_tokens(base, row.length, row.seed)
    (sequence,) = batch((32,))
    found, count = engine.loss([sequence])
    wanted, other = plain.loss([after(tokens, sequence)])
    assert count == other and found == pytest.approx(wanted, rel=1e-6)
    assert abs(found - plain.loss([sequence])[0]) > 1e-3


@pytest.mark.parametrize("name", ROWS)
def test_peft_finds_the_same_loss(base: QuantizedBase, name: str, tmp_path: Path) -> None:
    import peft

    row = ROWS[name]
    engine = loaded(row, base)
    vector = moved(engine)
    engine.write(vector)
    sequence = batch((32,))[0]
    total, count = engine.loss([sequence])
    export.to_peft(base, row.placement(base), engine.layout, vector, tmp_path / "out")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    model = peft.PeftModel.from_pretrained(model, str(tmp_path / "out"))
    ids, labels = (torch.from_numpy(x).long()[None] for x in (sequence.ids, sequence.labels))
    with torch.no_grad():
        assert total / count == pytest.approx(float(model(input_ids=ids, labels=labels).loss), abs=1e-5)
    engine.write(np.zeros_like(vector))
    assert abs(engine.loss([sequence])[0] - total) / count > 1e-3


def test_a_projected_prompt_moves_by_the_fixed_matrix(base: QuantizedBase) -> None:
    row = ProjectedPrompt(length=40, dimensions=30)
    prompt = row.placement(base).prompt
    assert prompt is not None and prompt.matrix is not None
    z = np.random.Generator(np.random.Philox(key=1)).standard_normal(30, np.float32)
    rows = prompt.rows(z)
    wanted = prompt.start.astype(np.float64) + (prompt.matrix.astype(np.float64) @ z).reshape(40, -1)
    np.testing.assert_allclose(rows, wanted, atol=1e-5)
    spread = USUAL * (rows - prompt.start).std() / prompt.start.std()
    assert 0.7 < spread < 1.4, "a z of the usual size moves by one standard deviation of the start"
    again = row.placement(base).prompt
    assert again is not None and np.array_equal(prompt.matrix, again.matrix)  # type: ignore[arg-type]  # it has one


def test_tokens_follow_from_the_seed_and_are_common_ones(base: QuantizedBase) -> None:
    assert start_tokens(base, 6, 1) == start_tokens(base, 9, 1)[:6] != start_tokens(base, 6, 2)
    assert max(start_tokens(base, 4096, 0)) < min(COMMON, base.embedding()[0])


def test_rows_of_the_embedding_are_those_of_the_whole_table(base: QuantizedBase, tmp_path: Path) -> None:
    for found in (base, build(str(tiny_llama(tmp_path / "model")), "int4-onnx", tmp_path / "int4")):
        whole = found.dequantized("model.embed_tokens.weight")
        assert np.array_equal(found.embeddings([7, 3, 7]), whole[[7, 3, 7]])
        assert found.embedding() == whole.shape


@pytest.mark.parametrize("name", ROWS)
def test_checkpoints_and_micro_batches_give_the_gradient_of_the_whole_batch(base: QuantizedBase, name: str) -> None:
    whole, small = (loaded(ROWS[name], base) for _ in range(2))
    start = moved(whole)
    for engine in (whole, small):
        engine.write(start)
        engine._optimizer.step = lambda: None
        engine._optimizer.zero_grad = lambda set_to_none: None
        engine._clip = 1e9
    small._plan = Plan(1, True, 0)
    small._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    small._model.enable_input_require_grads()
    for engine in (whole, small):
        engine.step(batch(), 0.0)
    for one, other in zip(whole._factors, small._factors, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=2e-2, atol=2e-4 * float(one.grad.abs().max()) + 1e-6)


def test_what_cannot_be_is_said(base: QuantizedBase, tmp_path: Path) -> None:
    for row in ROWS.values():
        with pytest.raises(SpecError, match="no embedding"):
            row.layout(ToyBase())
        with pytest.raises(UserError, match="--to peft"):
            export.to_merged(base, row.placement(base), row.layout(base), np.zeros(1, np.float32), tmp_path / "out")
    int4 = build(str(tiny_llama(tmp_path / "model")), "int4-onnx", tmp_path / "int4")
    with pytest.raises(SpecError, match="--engine torch"):
        OnnxEngine.load(int4, ROWS["prefix"], ROWS["prefix"].layout(int4), threads=1)
