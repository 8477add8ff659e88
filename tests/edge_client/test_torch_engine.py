"""The torch engine on a tiny Llama: what it computes is what plain transformers + peft compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edge_client.data import Example, Message
from edge_client.engines import IGNORE, Optimizer, Tokens
from edge_client.engines.torch_engine import TorchEngine
from edge_client.engines.torch_linear import PortableLinear, compute_in, linear
from edge_client.engines.torch_memory import plan
from edge_client.methods.lora import Lora
from quantize import QuantizedBase
from quantize.base_model import build
from tests.models import tiny_llama
from wire.delta import Vector
from wire.errors import MachineError

METHOD = Lora(rank=4, alpha=8.0, batch=4, sequence_length=32)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, QuantizedBase]:
    folder = tmp_path_factory.mktemp("models")
    model = tiny_llama(folder / "model", biases=True)
    torch.set_num_threads(1)
    return {name: build(str(model), name, folder / name) for name in ("nf4", "int8", "bf16")}


def engine(base: QuantizedBase, limit: int | None = None) -> TorchEngine:
    return TorchEngine.load(base, METHOD.tunes(), METHOD.tunes().layout(base), limit)


def batch(lengths: tuple[int, ...] = (32, 17, 32, 9)) -> list[Tokens]:
    chance = np.random.Generator(np.random.Philox(key=5))
    made = []
    for length in lengths:
        ids = chance.integers(0, 255, length).astype(np.int32)
        labels = ids.copy()
        labels[: length // 3] = IGNORE
        made.append(Tokens(ids, labels))
    return made


def away_from_zero(engine: TorchEngine, seed: int = 3) -> Vector:
    chance = np.random.Generator(np.random.Philox(key=seed))
    return chance.standard_normal(engine.layout.size, np.float32) * np.float32(0.05)


def gradients(engine: TorchEngine) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in engine._model.named_parameters() if p.grad is not None}


def backward(engine: TorchEngine, sequences: list[Tokens]) -> dict[str, torch.Tensor]:
    """The gradients of a step, without the step."""
    engine._optimizer.step = lambda: None
    kept: dict[str, torch.Tensor] = {}
    engine._optimizer.zero_grad = lambda set_to_none: kept.update(gradients(engine))
    engine._clip = 1e9
    engine.step(sequences, 0.0)
    for factor in engine._factors:
        factor.grad = None
    return kept


@pytest.mark.parametrize("base_format", ["nf4", "int8", "bf16"])
def test_after_evaluating_every_lora_b_still_has_a_gradient(bases: dict[str, Any], base_format: str) -> None:
    """bitsandbytes repacks evaluated NF4 weights on CPUs with avx512_bf16, and the repacked path has no gradient."""
    tuned = engine(bases[base_format])
    tuned.write(METHOD.tunes().initial(tuned.layout, 0))
    tuned.loss(batch())
    found = backward(tuned, batch())
    factors = [name for name in found if ".lora_B." in name]
    assert len(factors) == len(bases[base_format].linears())
    for name in factors:
        assert found[name].abs().max() > 0, name


def test_the_trap_of_repacked_weights_is_real_where_the_processor_has_bfloat16() -> None:
    from bitsandbytes.backends.cpu.ops import has_avx512bf16  # type: ignore[attr-defined]

    if not has_avx512bf16():
        pytest.skip("this processor has no avx512_bf16")
    from bitsandbytes.nn.modules import Linear4bit

    layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
    assert layer.support_avx512bf16_for_cpu, "if bitsandbytes no longer does this, the switch in torch_linear can go"


@pytest.mark.parametrize("base_format", ["nf4", "int8", "bf16"])
def test_a_loss_is_what_transformers_and_peft_compute_from_the_dequantized_weights(
    bases: dict[str, Any], base_format: str, tmp_path: Path
) -> None:
    import peft
    import transformers

    from edge_client import export

    base = bases[base_format]
    tuned = engine(base)
    adapter = away_from_zero(tuned)
    tuned.write(adapter)
    total, count = tuned.loss(batch())
    export.to_peft(base, METHOD.tunes().placement(base), tuned.layout, adapter, tmp_path / "out")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "base")
    model = peft.PeftModel.from_pretrained(model, str(tmp_path / "out"))
    theirs = 0.0
    for sequence in batch():
        ids = torch.from_numpy(sequence.ids).long()[None]
        labels = torch.from_numpy(sequence.labels).long()[None]
        with torch.no_grad():
            theirs += float(model(input_ids=ids, labels=labels).loss) * sequence.targets
    assert count == sum(s.targets for s in batch())
    assert total / count == pytest.approx(theirs / count, abs=1e-5)


def test_a_merged_export_is_the_same_function(bases: dict[str, Any], tmp_path: Path) -> None:
    import transformers

    from edge_client import export

    base = bases["nf4"]
    tuned = engine(base)
    adapter = away_from_zero(tuned)
    tuned.write(adapter)
    sequence = batch((32,))[0]
    total, count = tuned.loss([sequence])
    export.to_merged(base, METHOD.tunes().placement(base), tuned.layout, adapter, tmp_path / "out")
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids, labels = torch.from_numpy(sequence.ids).long()[None], torch.from_numpy(sequence.labels).long()[None]
    with torch.no_grad():
        assert total / count == pytest.approx(float(model(input_ids=ids, labels=labels).loss), abs=1e-5)


def test_the_portable_layer_computes_what_bitsandbytes_does(bases: dict[str, Any]) -> None:
    base, module = bases["nf4"], "model.layers.0.mlp.gate_proj"
    theirs = linear(base, module, CPU)
    ours = PortableLinear(
        "nf4",
        {s: torch.from_numpy(p.copy()) for s, p in base.parts(f"{module}.weight").items()},
        *base.shape(f"{module}.weight"),
    )
    for layer in (theirs, ours):
        compute_in(layer, torch.float32)
    x = torch.randn(5, base.shape(f"{module}.weight")[1], requires_grad=True)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    (mine,) = torch.autograd.grad(ours(x).square().sum(), x)
    (other,) = torch.autograd.grad(theirs(x).square().sum(), x)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_micro_batches_and_checkpoints_give_the_gradient_of_the_whole_batch(bases: dict[str, Any]) -> None:
    base = bases["bf16"]
    whole, small = engine(base), engine(base)
    start = away_from_zero(whole)
    whole.write(start)
    small.write(start)
    wanted = backward(whole, batch())
    roomy = small.expected_memory(4, 32).expected
    small._limit = roomy - 1
    small._plan = plan(small._model.config, base.bytes_on_disk, small.layout.size, 4, 32, roomy - 1)
    small._plan = type(small._plan)(1, True, 0)
    small._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    small._model.enable_input_require_grads()
    found = backward(small, batch())
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-2, atol=2e-4 * float(gradient.abs().max()) + 1e-6)


def test_steps_make_the_loss_smaller_and_repeat_bit_for_bit(bases: dict[str, Any]) -> None:
    def trained() -> tuple[float, float, Vector]:
        tuned = engine(bases["nf4"])
        tuned.write(METHOD.tunes().initial(tuned.layout, 0))
        before = tuned.loss(batch())[0]
        tuned.start(Optimizer())
        for _ in range(6):
            tuned.step(batch(), 5e-3)
        return before, tuned.loss(batch())[0], tuned.read()

    before, after, adapter = trained()
    assert after < before - 1
    assert np.array_equal(trained()[2], adapter)


def test_writing_and_reading_an_adapter_keeps_every_bit(bases: dict[str, Any]) -> None:
    tuned = engine(bases["nf4"])
    adapter = away_from_zero(tuned)
    tuned.write(adapter)
    assert np.array_equal(tuned.read(), adapter)


def test_training_that_diverges_is_said_and_not_sent(bases: dict[str, Any]) -> None:
    tuned = engine(bases["nf4"])
    tuned.write(np.full(tuned.layout.size, 1e30, np.float32))
    with pytest.raises(MachineError, match="not finite"):
        tuned.step(batch(), 1e-3)


def test_too_little_memory_is_said_with_the_least_that_would_do(bases: dict[str, Any]) -> None:
    tuned = engine(bases["nf4"], limit=100 << 20)
    with pytest.raises(MachineError, match="is the least"):
        tuned.step(batch(), 1e-3)


def test_less_memory_means_fewer_sequences_at_once_and_then_checkpoints(bases: dict[str, Any]) -> None:
    tuned = engine(bases["nf4"])
    config, fixed, size = tuned._model.config, bases["nf4"].bytes_on_disk, tuned.layout.size
    free = plan(config, fixed, size, 64, 512, None)
    assert (free.sequences, free.checkpoint) == (64, False)
    tighter = plan(config, fixed, size, 64, 512, free.expected - 1)
    assert (tighter.sequences, tighter.checkpoint) == (32, False)
    one = plan(config, fixed, size, 1, 512, None)
    assert plan(config, fixed, size, 64, 512, one.expected - 1).checkpoint


def test_of_a_dialogue_only_the_answers_are_learned(bases: dict[str, Any]) -> None:
    tuned = engine(bases["nf4"])
    said = (Message("user", "Hi"), Message("assistant", "Yes."), Message("user", "So?"), Message("assistant", "No."))
    (tokens,) = tuned.tokenize([Example(messages=said)], 512)
    learned = [int(i) for i, label in zip(tokens.ids, tokens.labels, strict=True) if label != IGNORE]
    assert tuned.text._tokenizer.decode(learned, skip_special_tokens=False) == "Yes.<|end|>No.<|end|>"


def test_plain_texts_are_packed_without_losing_a_token(bases: dict[str, Any]) -> None:
    tuned = engine(bases["nf4"])
    sequences = tuned.tokenize([Example(text="a" * 40), Example(text="b" * 40)], 32)
    assert [len(s.ids) for s in sequences] == [32, 32, 18]
    assert tuned.text._tokenizer.decode(
        np.concatenate([s.ids for s in sequences]).tolist(), skip_special_tokens=False
    ) == ("a" * 40 + "<|end|>" + "b" * 40 + "<|end|>")


def test_an_answer_is_the_same_for_the_same_seed(bases: dict[str, Any]) -> None:
    tuned = engine(bases["nf4"])
    one, two = (tuned.generate("Hello", 12, 0.8, 4, raw=False) for _ in range(2))
    assert one == two
    assert tuned.generate("Hello", 12, 0.0, 1, raw=True) == tuned.generate("Hello", 12, 0.0, 2, raw=True)
