"""Each row against its paper's arithmetic, done with whole matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from coordinator.aggregators import AGGREGATORS
from coordinator.aggregators.products import Update, aggregation_error, pairs
from tests import factors
from wire import spec
from wire.delta import Layout, Vector
from wire.errors import SpecError

PLAIN, KEPT = factors.layout(), factors.layout(history=30)
DEVICES = [(3, None), (1, None), (5, 2), (2, 1)]
"""Weight and rank."""


def updates(layout: Layout, seed: int = 0, devices: Any = tuple(DEVICES)) -> list[Update]:
    return [factors.update(layout, 100 * seed + n, weight, rank) for n, (weight, rank) in enumerate(devices)]


def made(row: dict[str, Any], layout: Layout, start: Vector, sent: list[Update]) -> Vector:
    total = spec.build(AGGREGATORS, row, "aggregator").start(layout, start)
    for one in sent:
        total.add(one.vector, one.weight, one.portion)
    adapter: Vector = start + total.mean()
    return adapter


def test_flexlora_is_the_mean_of_products_cut_by_a_full_decomposition() -> None:
    start = factors.adapter(PLAIN)
    found = made({"id": "flexlora"}, PLAIN, start, updates(PLAIN))
    for pair in pairs(PLAIN):
        mean = factors.mean_of_products(pair, start, updates(PLAIN))
        assert factors.relative(factors.dense(pair, found), factors.best(mean, 4)) < 1e-6
        small = factors.dense(pair, found, 2)
        assert factors.relative(small, factors.best(mean, 2)) < 1e-6, "what a device of rank 2 is given"


def test_flora_is_the_sum_of_products_over_several_rounds_while_the_history_holds_it() -> None:
    start = factors.adapter(KEPT, learned=False)
    adapter, wanted = start, [np.zeros((pair.b.shape[0], pair.a.shape[1])) for pair in pairs(KEPT)]
    for number in range(3):
        sent = updates(KEPT, number, DEVICES)
        for at, pair in enumerate(pairs(KEPT)):
            products = [factors.dense(pair, start + u.vector, u.rank) for u in sent]
            wanted[at] += np.average(np.array(products), axis=0, weights=[u.weight for u in sent])
        adapter = made({"id": "flora"}, KEPT, adapter, sent)
        for pair, does in zip(pairs(KEPT), wanted, strict=True):
            assert factors.relative(factors.dense(pair, adapter), does) < 1e-5
            assert (pair.of(adapter).a == pair.of(start).a).all() and not pair.of(adapter).b.any()


def test_flora_keeps_the_nearest_of_its_rank_where_the_history_overflows() -> None:
    narrow = factors.layout(history=5)
    start = factors.adapter(narrow, learned=False)
    found = made({"id": "flora"}, narrow, start, updates(narrow))
    for pair in pairs(narrow):
        mean = factors.mean_of_products(pair, start, updates(narrow))
        assert factors.relative(factors.dense(pair, found), factors.best(mean, 5)) < 1e-6


@pytest.mark.parametrize("row", ["flora", "fedex"])
def test_what_keeps_a_history_is_exact_from_any_start_and_with_any_ranks(row: str) -> None:
    adapter = factors.adapter(KEPT)
    for number in range(2):
        sent = updates(KEPT, number)
        before, adapter = adapter, made({"id": row}, KEPT, adapter, sent)
        for pair in pairs(KEPT):
            wanted = factors.mean_of_products(pair, before, sent)
            assert factors.relative(factors.dense(pair, adapter), wanted) < 1e-6
        error = aggregation_error(KEPT, before, adapter, sent)
        assert error is not None and error < 1e-5


def test_fedex_averages_the_factors_and_keeps_what_their_product_misses() -> None:
    start, sent = factors.adapter(KEPT), updates(KEPT, devices=((3, None), (1, None), (2, None)))
    found, mean = (made({"id": row}, KEPT, start, sent) for row in ("fedex", "mean"))
    for pair in pairs(KEPT):
        assert pair.a.of(found).tobytes() == pair.a.of(mean).tobytes()
        assert pair.b.of(found).tobytes() == pair.b.of(mean).tobytes()
        assert pair.history is not None
        missed = factors.mean_of_products(pair, start, sent) - factors.dense(pair, mean)
        assert factors.relative(factors.dense(pair.history, found), missed) < 1e-5


@pytest.mark.parametrize("row", ["flora", "fedex"])
def test_a_row_with_a_history_refuses_a_layout_without_one(row: str) -> None:
    with pytest.raises(SpecError, match="history = RANK"):
        spec.build(AGGREGATORS, {"id": row}).check_layout(PLAIN, None)


def by_descent(mean: factors.Matrix, b: factors.Matrix, a: factors.Matrix, penalty: float) -> factors.Matrix:
    """The D that minimizes ‖mean - (b + D) a‖² + penalty ‖D‖², by gradient descent."""
    found = np.zeros_like(b)
    rate = 0.5 / (np.linalg.norm(a, 2) ** 2 + penalty)
    for _ in range(20_000):
        found -= 2 * rate * (((b + found) @ a - mean) @ a.T + penalty * found)
    return found


@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_lora_fair_refines_b_as_a_numerical_minimizer_does(penalty: float) -> None:
    start, sent = factors.adapter(PLAIN), updates(PLAIN, devices=((3, None), (1, None), (2, None)))
    found, mean = (made(row, PLAIN, start, sent) for row in ({"id": "lora_fair", "penalty": penalty}, {"id": "mean"}))
    for pair in pairs(PLAIN):
        middle = pair.of(mean)
        wanted = by_descent(factors.mean_of_products(pair, start, sent), middle.b, middle.a, penalty)
        assert factors.relative(pair.of(found).b - middle.b, wanted) < 1e-3
        assert pair.a.of(found).tobytes() == pair.a.of(mean).tobytes()


def test_lora_fair_is_nearer_to_the_mean_of_products_than_the_mean() -> None:
    start, sent = factors.adapter(PLAIN), updates(PLAIN, devices=((3, None), (1, None), (2, None)))
    errors = [
        aggregation_error(PLAIN, start, made({"id": row}, PLAIN, start, sent), sent) for row in ("lora_fair", "mean")
    ]
    assert errors[0] is not None and errors[1] is not None and errors[0] < 0.9 * errors[1]


def test_a_penalty_is_positive() -> None:
    with pytest.raises(SpecError, match="penalty"):
        spec.build(AGGREGATORS, {"id": "lora_fair", "penalty": 0})


def test_hetlora_pads_with_zeros_and_weighs_by_the_size_of_the_product() -> None:
    start, sent = factors.adapter(PLAIN), updates(PLAIN)
    found = made({"id": "hetlora"}, PLAIN, start, sent)
    for pair in pairs(PLAIN):
        tuned = [(start + u.vector, u.rank, u.weight) for u in sent]
        sizes = np.array([w * np.linalg.norm(factors.dense(pair, v, rank)) for v, rank, w in tuned])
        a, b = np.zeros(pair.a.shape), np.zeros(pair.b.shape)
        for part, (vector, rank, _) in zip(sizes / sizes.sum(), tuned, strict=True):
            a[:rank] += part * pair.a.of(vector)[:rank]
            b[:, :rank] += part * pair.b.of(vector)[:, :rank]
        np.testing.assert_allclose(pair.a.of(found), a, atol=1e-7)
        np.testing.assert_allclose(pair.b.of(found), b, atol=1e-7)


def test_hetlora_counts_devices_alike_before_anything_is_learned() -> None:
    start = factors.adapter(PLAIN, learned=False)
    still = [Update(np.zeros(PLAIN.size, np.float32), weight) for weight in (1, 3)]
    assert np.allclose(made({"id": "hetlora"}, PLAIN, start, still), start, atol=1e-7)


def test_the_mean_of_devices_whose_ranks_differ_counts_each_row_by_those_that_have_it() -> None:
    """RBLA, arXiv 2408.08699."""
    start, sent = factors.adapter(PLAIN), updates(PLAIN)
    found = made({"id": "mean"}, PLAIN, start, sent)
    for pair in pairs(PLAIN):
        for row in range(4):
            owners = [u for u in sent if (u.rank or 4) > row]
            weights = [u.weight for u in owners]
            a = np.average([pair.a.of(start + u.vector)[row] for u in owners], axis=0, weights=weights)
            b = np.average([pair.b.of(start + u.vector)[:, row] for u in owners], axis=0, weights=weights)
            np.testing.assert_allclose(pair.a.of(found)[row], a, atol=1e-6)
            np.testing.assert_allclose(pair.b.of(found)[:, row], b, atol=1e-6)
