"""Factors turned before they are sent: products stay, means of factors come nearer to means of products."""

from __future__ import annotations

import numpy as np
import pytest

from coordinator.aggregators.products import Update, aggregation_error, pairs
from edge_client.methods.alignment import aligned, rotation
from edge_client.methods.hybrid import Hybrid
from edge_client.methods.lora import Lora
from tests import factors
from tests.experiments.test_portions import federation, texts
from wire.delta import Vector

WHOLE = factors.layout()
RELEASE = factors.adapter(WHOLE)


def moved(seed: int) -> Vector:
    return RELEASE + factors.update(WHOLE, seed).vector


@pytest.mark.parametrize("seed", range(5))
def test_no_other_angle_comes_nearer_than_the_rotation(seed: int) -> None:
    agreement = np.random.default_rng(seed).normal(size=(2, 2))
    angles = np.linspace(0, 2 * np.pi, 100_001)
    cosine, sine = np.cos(angles), np.sin(angles)
    traces = cosine * (agreement[0, 0] + agreement[1, 1]) + sine * (agreement[1, 0] - agreement[0, 1])
    found = rotation(agreement, 1)
    assert np.trace(found.T @ agreement) == pytest.approx(traces.max(), abs=1e-8)
    assert np.linalg.det(found) == pytest.approx(1)


@pytest.mark.parametrize("by", ["A", "B"])
@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_what_the_model_computes_is_unchanged_and_the_factor_is_nearer_to_the_releases(
    by: str, strength: float
) -> None:
    before = moved(1)
    after = aligned(before, RELEASE, WHOLE, strength, by, None)
    for pair in pairs(WHOLE):
        assert factors.relative(factors.dense(pair, after), factors.dense(pair, before)) < 1e-6
        place = pair.a if by == "A" else pair.b
        away = [np.linalg.norm(place.of(vector) - place.of(RELEASE)) for vector in (after, before)]
        assert away[0] < away[1]
    assert np.array_equal(after[-3:], before[-3:])


def test_a_frozen_factor_is_not_turned() -> None:
    before = moved(2)
    after = aligned(before, RELEASE, WHOLE, 1.0, "A", (1, 2, 3))
    assert np.array_equal(after[: 4 * 20 + 24 * 4], before[: 4 * 20 + 24 * 4]) and not np.array_equal(after, before)


def test_devices_that_turned_apart_come_together_and_their_mean_is_exact() -> None:
    turns = [np.linalg.qr(np.random.default_rng(n).normal(size=(4, 4)))[0] for n in range(3)]
    turns = [turn * np.sign(np.linalg.det(turn)) ** np.array([1, 0, 0, 0]) for turn in turns]
    apart = []
    for turn in turns:
        vector = RELEASE.copy()
        for pair in pairs(WHOLE):
            pair.a.of(vector)[...] = turn @ pair.a.of(RELEASE)
            pair.b.of(vector)[...] = 1.5 * pair.b.of(RELEASE) @ turn.T
        apart.append(vector)
    together = [aligned(vector, RELEASE, WHOLE, 1.0, "A", None) for vector in apart]
    assert error(apart) > 1 > 1e-5 > error(together)


def error(adapters: list[Vector]) -> float:
    updates = [Update(vector - RELEASE, 1) for vector in adapters]
    mean = np.array(adapters).mean(axis=0, dtype=np.float64).astype(np.float32)
    found = aggregation_error(WHOLE, RELEASE, mean, updates)
    assert found is not None
    return found


def mean_error(align: float | None) -> float:
    """Over the rounds of a federation whose devices train long on text of their own."""
    method = {"id": "lora", "rank": 4, "local_steps": 30, "batch": 2, "sequence_length": 32, "learning_rate": 0.05}
    simulation = federation(method=method if align is None else method | {"align": align})
    errors = []
    for _ in range(4):
        start, text = simulation.adapter, texts(simulation)
        sent = [simulation.sent(device, text[device]) for device in text]
        rules = simulation.rules
        updates = [Update(rules.vector(rules.read(one.payload), 1, one.device), 1) for one in sent]
        simulation.publish(sent)
        errors.append(aggregation_error(simulation.layout, start, simulation.adapter, updates) or 0)
    return float(np.mean(errors))


def test_a_federations_error_of_means_falls() -> None:
    plain, soft, full = (mean_error(align) for align in (None, 0.5, 1.0))
    print(f"mean error of {plain:.4f} without, {soft:.4f} at 0.5, {full:.4f} at 1")
    assert max(soft, full) < plain


def test_align_is_refused_where_it_means_nothing() -> None:
    with pytest.raises(ValueError, match="align"):
        Lora(align=0.0)
    with pytest.raises(ValueError, match="below the cut"):
        Hybrid(align=0.5)
