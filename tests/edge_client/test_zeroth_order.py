"""Zeroth-order rows on the toy engine: which directions they measure, when they move, and that they learn."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_client.engines import Tokens
from edge_client.engines.toy import ToyBase, ToyEngine
from edge_client.methods import METHODS, Draw
from edge_client.methods.zeroth_order import FwdLLM, ZerothOrder
from wire import spec
from wire.delta import Layout, Tensor
from wire.errors import MachineError, SpecError
from wire.scalars import Scalars, Step, Trajectory

ADAPTER = {"id": "lora", "rank": 2, "tuned": "B"}
COMMON: dict[str, Any] = {"adapter": ADAPTER, "local_steps": 40, "epsilon": 1e-2, "learning_rate": 5e-2}


def method(row: str, **more: Any) -> ZerothOrder:
    made: ZerothOrder = spec.build(METHODS, {"id": row} | COMMON | more)
    return made


def loaded(row: ZerothOrder) -> tuple[ToyEngine, Trajectory]:
    layout = row.tunes().layout(ToyBase())
    start = Trajectory.start(row.directions(), layout, row.tunes().initial(layout, 1))
    return ToyEngine.load(ToyBase(), row.tunes(), layout), start


def sequences() -> list[Tokens]:
    ids = np.frombuffer(b"the quick brown fox jumps over the lazy dog", np.uint8).astype(np.int32)
    return [Tokens(ids, ids.copy())] * 8


@pytest.mark.parametrize(
    ("row", "more"),
    [
        ("mezo", {}),
        ("mezo", {"subspace": {"structure": "subzero", "rank": 4, "refresh": 3}}),
        ("mezo", {"subspace": {"structure": "lozo", "rank": 1, "refresh": 3}}),
        ("kseed", {"pool": 64, "subspace": {"structure": "subzero", "rank": 4, "refresh": 0}}),
        ("fwdllm", {}),
        ("fwdllm", {"difference": "central", "candidates": 8, "variance": 2.0}),
    ],
)
def test_rows_lower_the_loss_and_their_update_leads_where_they_went(row: str, more: dict[str, Any]) -> None:
    tuned = method(row, **more)
    engine, state = loaded(tuned)
    before = engine.losses(sequences(), [state.adapter])[0]
    for number in range(1, 7):
        key = state.directions.key(0, number, "d")
        trained = tuned.train(engine, state, sequences(), Draw(number, key, (number - 1) / 6))
        assert isinstance(trained.update, Scalars)
        units = trained.update.units if state.sums is None else trained.update.units + state.sums
        state = state.after(Step(((key, units),)))
        assert np.allclose(state.adapter, trained.adapter, atol=1e-6)
    assert engine.losses(sequences(), [state.adapter])[0] < before - 0.05


def test_fwdllm_measures_what_lies_most_along_the_runs_last_step() -> None:
    row = FwdLLM(ADAPTER, local_steps=4, perturbations=2, candidates=8)
    engine, state = loaded(row)
    assert list(row._numbers(1, state, Draw(0, 5))) == [16, 17]
    moved = Trajectory(**{**vars(state), "moved": state.direction(5, 20) - np.float32(0.5) * state.direction(5, 30)})
    assert row._numbers(1, moved, Draw(0, 5)) == [20, 30]
    trained = row.train(engine, moved, sequences(), Draw(0, 5))
    assert isinstance(trained.update, Scalars)
    used = np.flatnonzero(trained.update.values)
    assert 0 < len(used) <= 8 < trained.update.directions.count == 64


def test_what_was_not_measured_does_not_travel() -> None:
    row = method("fwdllm", candidates=16)
    layout = Layout((Tensor("w", (100,)),))
    values = np.zeros(row.directions().count, np.int32)
    values[::16] = 7
    payload = Scalars(row.directions(), values, 20).encode(layout)
    assert len(payload) == 23 + 40 * 4 < row.directions().max_bytes()


def test_a_move_waits_while_its_estimate_is_too_uncertain() -> None:
    strict, loose = method("fwdllm", variance=1e-6), method("fwdllm", variance=1e6)
    ends = []
    for row in (strict, loose):
        engine, state = loaded(row)
        found = row.train(engine, state, sequences(), Draw(0, 5))
        ends.append(np.abs(found.adapter - state.adapter).mean())
    assert ends[0] < ends[1] / 3  # one move by the mean of forty slopes, against forty moves


def test_a_loss_that_is_not_finite_ends_training_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    row = method("mezo")
    engine, state = loaded(row)
    monkeypatch.setattr(engine, "losses", lambda batch, adapters: np.full(len(adapters), np.nan))
    with pytest.raises(MachineError, match="learning_rate or epsilon"):
        row.train(engine, state, sequences(), Draw(0, 5))


@pytest.mark.parametrize(
    ("row", "changed", "said"),
    [
        ("hiso", {"subspace": {"rank": 2}}, "curvature"),
        ("kseed", {"subspace": {"rank": 2, "refresh": 5}}, "refresh = 0"),
        ("mezo", {"subspace": {"structure": "dense"}}, "structure"),
        ("fwdllm", {"candidates": 0}, "candidates"),
        ("fwdllm", {"variance": 0.0}, "variance"),
        ("fwdllm", {"local_steps": 40_000, "candidates": 60}, "count"),
        ("hybrid", {"layers": 0}, "layers"),
        ("hybrid", {"epsilon": 0.0}, "epsilon"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_by_name(row: str, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError, match=said):
        spec.build(METHODS, {"id": row, **changed}, "method")
