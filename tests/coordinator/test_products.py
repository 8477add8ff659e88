from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from coordinator.aggregators import AGGREGATORS
from coordinator.aggregators.products import Product, Update, aggregation_error, nearest, pairs, square, terms, total
from tests import factors
from wire import spec
from wire.delta import Layout, Tensor, Vector
from wire.errors import SpecError
from wire.portion_rules import Alternate
from wire.portions import Portion

WHOLE = factors.layout()
START = factors.adapter(WHOLE)


def drawn(rank: int, seed: int = 0, decay: float = 1.0) -> Product:
    chance = np.random.default_rng(seed)
    return Product(chance.normal(size=(40, rank)) * decay ** np.arange(rank), chance.normal(size=(rank, 30)))


def dense(product: Product) -> factors.Matrix:
    return product.b @ product.a


@pytest.mark.parametrize("rank", [1, 3, 17, 35, 60])
def test_the_size_of_a_product_is_that_of_its_matrix(rank: int) -> None:
    assert square(drawn(rank)) == pytest.approx(np.square(dense(drawn(rank))).sum(), rel=1e-12)


def test_products_add_up_by_their_factors() -> None:
    parts = [drawn(3), drawn(2, 1).times(-0.5), drawn(4, 2).cut(2)]
    assert np.allclose(dense(total(parts)), sum(dense(part) for part in parts))


@pytest.mark.parametrize("decay", [1.0, 0.8, 0.3])
@pytest.mark.parametrize("rank", [2, 8])
def test_the_nearest_product_is_as_near_as_that_of_a_full_decomposition(rank: int, decay: float) -> None:
    product = drawn(25, decay=decay)
    best = np.linalg.norm(dense(product) - factors.best(dense(product), rank))
    found = nearest(product, rank, np.zeros((rank, 30)))
    assert np.linalg.norm(dense(product) - dense(found)) <= (1.01 if decay == 1 else 1.0002) * best
    np.testing.assert_allclose(np.linalg.norm(found.b, axis=0), np.linalg.norm(found.a, axis=1))
    assert (np.diff(np.linalg.norm(found.a, axis=1)) <= 1e-12).all(), "the largest first"


def test_a_product_of_no_more_rank_comes_back_whole_with_its_spare_rows() -> None:
    spare = np.random.default_rng(7).normal(size=(6, 30))
    found = nearest(drawn(4), 6, spare)
    assert factors.relative(dense(found), dense(drawn(4))) < 1e-12
    assert not found.b[:, 4:].any() and (found.a[4:] == spare[4:]).all()
    gone = total([drawn(4), drawn(4).times(-1)])
    assert not nearest(gone, 6, spare).b.any(), "what cancels is its rounding"


def test_no_matrix_of_a_modules_size_is_made() -> None:
    big, chance = (
        Layout((Tensor("m.lora_A.w", (2, 2000), "lora_A"), Tensor("m.lora_B.w", (2000, 2), "lora_B"))),
        np.random.default_rng(0),
    )
    updates = [Update(chance.normal(0, 0.1, big.size).astype(np.float32), 1) for _ in range(4)]
    start = np.zeros(big.size, np.float32)
    tracemalloc.start()
    for row in ("flexlora", "lora_fair", "hetlora"):
        folded = spec.build(AGGREGATORS, {"id": row}).start(big, start)
        for one in updates:
            folded.add(one.vector, 1)
        assert aggregation_error(big, start, folded.mean(), updates) is not None
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.1 * 8 * 2000 * 2000


def test_signs_follow_from_the_product_and_not_from_how_it_is_written() -> None:
    product = drawn(5)
    turned = Product(-product.b[:, ::-1], -product.a[::-1])
    one, other = (nearest(p, 4, np.zeros((4, 30))) for p in (product, turned))
    np.testing.assert_allclose(one.a, other.a, rtol=1e-9)


def test_pairs_are_found_by_name_and_role_wherever_they_lie() -> None:
    kept = factors.layout(history=6, modules=2)
    mixed = Layout(kept.tensors[::-1])
    for layout in (kept, mixed):
        found = pairs(layout)
        assert {(p.a.tensor.name, p.b.tensor.name) for p in found} == {
            (f"base_model.model.m{n}.lora_A.weight", f"base_model.model.m{n}.lora_B.weight") for n in (0, 1)
        }
        assert all(p.history is not None and p.history.rank == 6 for p in found)
    with pytest.raises(SpecError, match="both A and B"):
        pairs(Layout((Tensor("base_model.model.m.lora_B.weight", (4, 2), "lora_B"),)))


def test_a_device_counts_by_what_it_tuned_and_is_no_wider_than_its_rank() -> None:
    [first, second] = pairs(WHOLE)
    small, other = factors.update(WHOLE, 1, 3, rank=2), Update(START, 1, Portion((0,)))
    found = terms(first, START, [small, other])
    assert [term.share for term in found] == [0.75, 0.25]
    assert [term.product.rank for term in found] == [2, 4]
    assert [term.share for term in terms(second, START, [small, other])] == [1.0]
    assert factors.relative(dense(found[0].product), factors.dense(first, START + small.vector, 2)) < 1e-7


def error_by_hand(updates: list[Update], made: Vector) -> float:
    missed = moved = 0.0
    for pair in pairs(WHOLE):
        mean = factors.mean_of_products(pair, START, updates)
        missed += float(np.square(mean - factors.dense(pair, made)).sum())
        moved += float(np.square(mean - factors.dense(pair, START)).sum())
    gain = np.average([(START + u.vector)[-3:] for u in updates], axis=0, weights=[u.weight for u in updates])
    missed += float(np.square(gain - made[-3:]).sum())
    moved += float(np.square(gain - START[-3:]).sum())
    return float(np.sqrt(missed / moved))


def mean(updates: list[Update]) -> Vector:
    weights = [u.weight for u in updates]
    made: Vector = START + np.average([u.vector for u in updates], axis=0, weights=weights).astype(np.float32)
    return made


def test_the_aggregation_error_is_that_of_dense_arithmetic() -> None:
    updates = [factors.update(WHOLE, n, n + 1) for n in range(4)]
    found = aggregation_error(WHOLE, START, mean(updates), updates)
    assert found == pytest.approx(error_by_hand(updates, mean(updates)), rel=1e-5)
    assert found is not None and found > 0.01, "the mean of products is not the product of means"


def test_the_aggregation_error_of_one_factor_in_a_round_is_none_but_rounding() -> None:
    for number in (1, 2):
        portion = Alternate().most(WHOLE, number, "")
        whole = [factors.update(WHOLE, n, n + 1).vector for n in range(4)]
        updates = [Update(portion.put(portion.take(v, WHOLE), WHOLE), n + 1, portion) for n, v in enumerate(whole)]
        found = aggregation_error(WHOLE, START, mean(updates), updates)
        assert found is not None and found < 1e-6


@pytest.mark.parametrize("role", ["core", "lora_B"])
def test_the_aggregation_error_of_what_is_proportional_is_none_but_rounding(role: str) -> None:
    layout = Layout((Tensor("m.lora_x.weight", (4, 4), role),))  # type: ignore[arg-type]
    start = np.zeros(16, np.float32)
    updates = [Update(np.random.default_rng(n).normal(size=16).astype(np.float32), n + 1) for n in range(3)]
    middle = np.average([u.vector for u in updates], axis=0, weights=[1, 2, 3]).astype(np.float32)
    found = aggregation_error(layout, start, middle, updates)
    assert found is not None and found < 1e-6
    small = Update(
        np.where(np.arange(16).reshape(4, 4) % 4 < 2, middle.reshape(4, 4), 0).reshape(-1), 1, Portion((0,), 2)
    )
    mixed = aggregation_error(layout, start, middle, [*updates, small])
    assert mixed is not None and mixed > 0.01, "rows that only some have"


def test_there_is_no_aggregation_error_without_factors_or_without_a_change() -> None:
    gain = Layout((Tensor("norm", (3,), "gain"),))
    ones = np.ones(3, np.float32)
    assert aggregation_error(gain, ones, ones, [Update(ones, 1)]) is None
    assert aggregation_error(WHOLE, START, START, [Update(np.zeros_like(START), 1)]) is None
