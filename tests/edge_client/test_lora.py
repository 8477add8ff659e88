from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from edge_client.engines import Tokens
from edge_client.engines.toy import ToyBase, ToyEngine
from edge_client.methods import METHODS, Draw, batches
from edge_client.methods.lora import Lora
from wire import spec
from wire.delta import Delta, Layout, Tensor, Vector
from wire.errors import SpecError
from wire.scalars import Directions, Trajectory


def toy(method: Lora) -> ToyEngine:
    base = ToyBase()
    return ToyEngine.load(base, method.tunes(), method.tunes().layout(base))


def from_(start: Vector) -> Trajectory:
    return Trajectory.start(Directions(), Layout((Tensor("any", (len(start),)),)), start)


def sequences(count: int = 12, length: int = 20) -> list[Tokens]:
    chance = np.random.Generator(np.random.Philox(key=1))
    made = [chance.integers(1, 30, length).astype(np.int32) for _ in range(count)]
    return [Tokens(ids, ids) for ids in made]


def test_the_initial_adapter_has_the_bits_that_the_wire_format_promises() -> None:
    method = Lora(rank=2)
    layout = method.tunes().layout(ToyBase())
    adapter = method.tunes().initial(layout, 7)
    raw = np.random.Philox(key=7).random_raw(512) >> 40
    wanted = (raw.astype(np.float64) * 2.0**-23 - 1).astype(np.float32) * np.float32(1 / 16)
    assert np.array_equal(adapter[:512], wanted)
    assert not adapter[512:].any()
    assert hashlib.sha256(adapter.tobytes()).hexdigest()[:16] == "4205fa953ae1206d"


def test_the_delta_is_what_training_added_to_the_release() -> None:
    method = Lora(rank=2, local_steps=3, batch=4, learning_rate=0.01)
    engine = toy(method)
    start = method.tunes().initial(engine.layout, 1)
    trained = method.train(engine, from_(start), sequences(), Draw(5))
    assert isinstance(trained.update, Delta)
    moved = trained.update.vector
    assert np.array_equal(moved, engine.read() - start)
    assert np.abs(moved).max() > 0
    assert trained.steps == 3
    assert trained.tokens == 3 * 4 * 20


def test_the_same_seed_draws_the_same_batches_and_another_draws_others() -> None:
    method = Lora(rank=2, local_steps=3, batch=4)
    engine = toy(method)
    start = method.tunes().initial(engine.layout, 1)
    one, two, other = (method.train(engine, from_(start), sequences(), Draw(seed)).adapter for seed in (5, 5, 6))
    assert np.array_equal(one, two)
    assert not np.array_equal(one, other)


def test_every_sequence_comes_once_before_any_comes_again() -> None:
    given = sequences(12)
    drawn = [id(s) for batch in batches(given, 3, 4, 9) for s in batch]
    assert sorted(drawn) == sorted(map(id, given))


def test_a_batch_larger_than_the_data_takes_sequences_again() -> None:
    assert [len(batch) for batch in batches(sequences(2), 2, 5, 9)] == [5, 5]


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [("constant", [0.5, 1, 1, 1, 1]), ("linear", [0.5, 1, 1, 0.75, 0.5]), ("cosine", [0.5, 1, 1, 0.8536, 0.5])],
)
def test_the_learning_rate_warms_up_and_then_follows_the_schedule(schedule: Any, wanted: list[float]) -> None:
    method = Lora(local_steps=6, warmup_steps=2, learning_rate=1.0, schedule=schedule)
    assert [method._rate(i) for i in range(5)] == pytest.approx(wanted, abs=1e-4)


def test_progress_is_told_after_each_step() -> None:
    method = Lora(rank=2, local_steps=3)
    engine = toy(method)
    told: list[tuple[int, int]] = []
    start = from_(method.tunes().initial(engine.layout, 0))
    method.train(engine, start, sequences(), Draw(0), lambda n, of, _: told.append((n, of)))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_targets_that_the_base_does_not_have_are_refused_by_name() -> None:
    with pytest.raises(SpecError, match=r"no module 'q_proj' in this base; it has bigram"):
        Lora(targets=("q_proj",)).tunes().layout(ToyBase())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rank": 0}, "rank must lie between"),
        ({"alpha": 0}, "alpha must be positive"),
        ({"learning_rate": -1.0}, "learning_rate must be positive"),
        ({"targets": "some"}, "all-linear"),
        ({"targets": []}, "all-linear"),
        ({"warmup_steps": 99}, "warmup_steps"),
        ({"schedule": "square"}, "schedule"),
        ({"optimizer": {"id": "lion"}}, "optimizer"),
        ({"optimizer": {"clip_norm": 0}}, "clip_norm"),
        ({"rnk": 3}, "unknown key 'rnk'"),
        ({"batch": 2.5}, "a whole number"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        spec.build(METHODS, {"id": "lora", **changed}, "method")
