"""Hybrid order on a tiny Llama: gradients above the cut are those of the whole, slopes below are those of the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from edge_client.engines import IGNORE, Optimizer, Tokens
from edge_client.engines.torch_engine import TorchEngine
from edge_client.methods import Draw
from edge_client.methods.hybrid import Hybrid
from edge_client.methods.lora import Lora
from edge_client.participate import codec_state
from quantize import QuantizedBase
from quantize.base_model import build
from tests.models import tiny_llama
from wire.codecs.chain import codec
from wire.delta import Layout, Tensor, Vector
from wire.errors import SpecError
from wire.scalars import Trajectory
from wire.split import Split

METHOD = Hybrid(rank=4, alpha=8.0, layers=1, local_steps=3, perturbations=2, batch=4, sequence_length=32)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> QuantizedBase:
    folder = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)
    return build(str(tiny_llama(folder / "model")), "bf16", folder / "bf16")


def engine(base: QuantizedBase, limit: int | None = None) -> TorchEngine:
    return TorchEngine.load(base, METHOD.tunes(), METHOD.tunes().layout(base), limit)


def batch() -> list[Tokens]:
    chance = np.random.Generator(np.random.Philox(key=5))
    made = []
    for length in (32, 17, 32, 9):
        ids = chance.integers(0, 255, length).astype(np.int32)
        made.append(Tokens(ids, np.where(np.arange(length) < 3, IGNORE, ids).astype(np.int32)))
    return made


def away_from_zero(layout: Layout) -> Vector:
    chance = np.random.Generator(np.random.Philox(key=3))
    return chance.standard_normal(layout.size, np.float32) * np.float32(0.05)


def start(engine: TorchEngine) -> Trajectory:
    return Trajectory.start(METHOD.directions(), engine.layout, away_from_zero(engine.layout))


def test_above_the_cut_a_step_is_that_of_the_whole(base: QuantizedBase) -> None:
    whole, cut = engine(base), engine(base)
    plain = Optimizer(id="sgd", clip_norm=1e9)
    whole.start(plain)
    lower = cut.layout.below(cut.start_above(plain, 1, 4, 32)).size
    for one in (whole, cut):
        one.write(away_from_zero(one.layout))
        one.step(batch(), 0.1)
    moved = whole.read() - away_from_zero(whole.layout)
    assert np.abs(moved[:lower]).max() > 0 == np.abs(cut.read()[:lower] - away_from_zero(cut.layout)[:lower]).max()
    gap = np.abs(cut.read()[lower:] - whole.read()[lower:]).max()
    assert gap < 0.02 * np.abs(moved[lower:]).max()


def test_below_the_cut_surrogates_differ_as_losses_do(base: QuantizedBase) -> None:
    one = engine(base)
    lower = one.layout.below(one.start_above(Optimizer(), 1, 4, 32)).size
    adapter = away_from_zero(one.layout)
    one.write(adapter)
    one.step(batch(), 1e-9)
    state = start(one)
    slopes, wanted = [], []
    for number in range(12):
        z = state.direction(1, number).copy()
        z[lower:] = 0
        shift = np.float32(1e-3) * z
        up, down = one.surrogates([(adapter + shift)[:lower], (adapter - shift)[:lower]])
        slopes.append((up - down) / 2e-3)
        above, under = one.losses(batch(), [adapter + shift, adapter - shift])
        wanted.append((above - under) / 2e-3)
    assert np.corrcoef(slopes, wanted)[0, 1] > 0.995
    assert np.linalg.norm(np.subtract(slopes, wanted)) < 0.1 * np.linalg.norm(wanted)


def test_its_update_is_split_and_says_where_it_leads(base: QuantizedBase) -> None:
    one = engine(base)
    trained = METHOD.train(one, start(one), batch(), Draw(1, 77))
    assert isinstance(trained.update, Split) and trained.update.scalars.directions.count == 6
    reached = start(one).adapter + trained.update.vector(77, 0)
    assert np.array_equal(trained.adapter, reached)
    lower = one.layout.below(trained.update.below).size
    assert np.abs(trained.update.vector(77, 0)[:lower]).max() > 0
    assert np.allclose(one.read(), reached, atol=1e-6)
    assert trained.forwards == round(3 * (5 * 0.5 + 3 * 0.5))


def test_after_a_cut_another_method_on_the_same_engine_tunes_everything(base: QuantizedBase) -> None:
    plain = Lora(rank=4, alpha=8.0, local_steps=2, batch=4, sequence_length=32)
    used, fresh = engine(base), engine(base)
    METHOD.train(used, start(used), batch(), Draw(1, 7))
    one, other = (plain.train(e, start(e), batch(), Draw(1, 7)).adapter for e in (used, fresh))
    assert np.array_equal(one, other)


def test_with_gradients_in_every_layer_it_is_lora(base: QuantizedBase) -> None:
    plain = Lora(rank=4, alpha=8.0, local_steps=3, batch=4, sequence_length=32)
    hybrid = Hybrid(rank=4, alpha=8.0, local_steps=3, batch=4, sequence_length=32)  # no limit: all layers fit
    one, other = (method.train(e := engine(base), start(e), batch(), Draw(1, 7)).adapter for method in (plain, hybrid))
    assert np.array_equal(one, other)


def test_a_device_of_less_memory_cuts_higher(base: QuantizedBase) -> None:
    roomy = engine(base).expected_memory(4, 32).expected
    assert engine(base, limit=2 * roomy).start_above(Optimizer(), None, 4, 32) == 0
    small = engine(base, limit=roomy - 1000)
    assert small.start_above(Optimizer(), None, 4, 32) > 0 and small.expected_memory(4, 32).expected < roomy
    assert small.share_below() == 0.5


def test_an_adapter_that_lies_below_the_cut_alone_is_refused(base: QuantizedBase) -> None:
    method = Hybrid(layers=1, adapter={"id": "lora", "targets": ["model.layers.0.self_attn.q_proj"]})
    layout = method.tunes().layout(base)
    one = TorchEngine.load(base, method.tunes(), layout)
    with pytest.raises(SpecError, match="tunes nothing in the last 1 layers"):
        one.start_above(Optimizer(), 1, 4, 32)


def test_codec_state_of_another_cut_is_not_used() -> None:
    chain = codec("top_k_int4")
    small, large = (Layout((Tensor("w", (size, 100)),)) for size in (10, 20))
    kept = {key: value + 1 for key, value in chain.init(small).items()}
    (residual,) = kept
    assert codec_state(chain, small, kept) is kept
    assert codec_state(chain, large, kept)[residual].shape == (2000,)
    assert not codec_state(chain, small, None)[residual].any()
