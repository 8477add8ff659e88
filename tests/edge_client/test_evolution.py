"""The evolution strategy on functions whose minimum is known, and as a method on an engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from edge_client.data import Example
from edge_client.engines.onnx_engine import OnnxEngine
from edge_client.engines.toy import ToyBase, ToyEngine
from edge_client.methods import Draw
from edge_client.methods.evolution import Bpt, Numbers, SeparableCma
from quantize.base_model import build
from tests.edge_client.test_zeroth_order import sequences
from tests.models import tiny_llama
from wire.delta import Delta
from wire.errors import MachineError
from wire.scalars import Directions, Trajectory

CORE = {"id": "lora", "rank": 2}


def spent(scales: Numbers, target: float, seed: int = 0, generations: int = 4000) -> int:
    """Losses that the strategy needs on a sum of squares with these scales, from a point away from its minimum at 1."""
    strategy = SeparableCma(np.full(scales.size, 3.0), 1.0, 12, seed)
    for number in range(generations):
        found = (scales * (strategy.ask() - 1.0) ** 2).sum(axis=1)
        strategy.tell(found)
        if found.min() < target:
            return 12 * (number + 1)
    return 12 * generations


def test_it_finds_the_minimum_of_a_sphere_about_as_fast_as_its_authors_say() -> None:
    """In 20 dimensions CMA-ES needs some 3,000 evaluations from here to 1e-10."""
    assert spent(np.ones(20), 1e-10) < 6_000


def test_it_learns_the_scale_of_each_dimension() -> None:
    """A million between the steepest and the flattest: a strategy without that would need a million steps along the flattest."""
    assert spent(10.0 ** np.linspace(0, 6, 20), 1e-10) < 15_000


def test_the_same_seed_asks_the_same() -> None:
    one, other, third = (SeparableCma(np.zeros(5), 1.0, 8, seed).ask() for seed in (1, 1, 2))
    assert np.array_equal(one, other) and not np.array_equal(one, third)


def trajectory(row: Bpt, seed: int = 1) -> Trajectory:
    layout = row.tunes().layout(ToyBase())
    return Trajectory.start(Directions(), layout, row.tunes().initial(layout, seed))


def test_rounds_lower_the_loss_and_the_update_is_where_the_mean_went() -> None:
    row = Bpt(CORE, local_steps=20, sigma=0.1, schedule="constant")
    engine = ToyEngine.load(ToyBase(), row.tunes(), row.tunes().layout(ToyBase()))
    state = trajectory(row)
    before = engine.losses(sequences(), [state.adapter])[0]
    for number in range(3):
        trained = row.train(engine, state, sequences(), Draw(number))
        assert isinstance(trained.update, Delta) and trained.forwards == 20 * (4 + int(3 * np.log(1024)))
        assert np.allclose(state.adapter + trained.update.vector, trained.adapter, atol=1e-6)
        state = Trajectory.start(state.directions, state.layout, trained.adapter, number + 1)
    assert engine.losses(sequences(), [state.adapter])[0] < before - 0.1


def test_what_is_not_tuned_in_a_round_stays() -> None:
    row = Bpt(CORE, local_steps=2)
    engine = ToyEngine.load(ToyBase(), row.tunes(), row.tunes().layout(ToyBase()))
    trained = row.train(engine, trajectory(row), sequences(), Draw(0, tuned=(1,)))
    assert isinstance(trained.update, Delta)
    assert not trained.update.vector[:512].any() and trained.update.vector[512:].all()


def test_a_loss_that_is_not_finite_ends_training_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Bpt(CORE)
    engine = ToyEngine.load(ToyBase(), row.tunes(), row.tunes().layout(ToyBase()))
    monkeypatch.setattr(engine, "losses", lambda batch, adapters: np.full(len(adapters), np.nan))
    with pytest.raises(MachineError, match="sigma"):
        row.train(engine, trajectory(row), sequences(), Draw(0))


def test_a_projected_prompt_learns_under_the_onnx_engine(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    base = build(str(tiny_llama(tmp_path / "model")), "int4-onnx", tmp_path / "int4")
    row = Bpt({"id": "projected_prompt", "length": 4, "dimensions": 20}, local_steps=12, schedule="constant")
    adapter, layout = row.tunes(), row.tunes().layout(base)
    engine = OnnxEngine.load(base, adapter, layout, threads=1)
    train = engine.tokenize([Example(text="The quick brown fox jumps over the lazy dog. " * 4)], 24)
    start = Trajectory.start(Directions(), layout, adapter.initial(layout, 0))
    before = engine.losses(train, [start.adapter])[0]
    trained = row.train(engine, start, train, Draw(0))
    assert engine.losses(train, [trained.adapter])[0] < before - 0.02
