"""What every row of AGGREGATORS does, whatever becomes of each entry."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from coordinator.aggregators import AGGREGATORS
from coordinator.aggregators.products import Update, pairs
from tests import factors
from wire import spec
from wire.delta import Layout, Tensor, Vector
from wire.errors import PayloadError, Reason, SpecError
from wire.portions import Portion

every = pytest.mark.parametrize("row", sorted(AGGREGATORS))
WHOLE = factors.layout(history=12)
START = factors.adapter(WHOLE)


def row_of(name: str) -> Any:
    return spec.build(AGGREGATORS, {"id": name}, "aggregator")


def made(name: str, updates: list[Update], layout: Layout = WHOLE, start: Vector = START) -> Vector:
    """The new adapter, float32 [size]."""
    total = row_of(name).start(layout, start)
    for one in updates:
        total.add(one.vector, one.weight, one.portion)
    delta = total.mean()
    assert delta.dtype == np.float32 and delta.shape == (layout.size,)
    return start + delta  # type: ignore[no-any-return]


@every
def test_a_lone_update_is_what_the_model_then_does(row: str) -> None:
    lone = factors.update(WHOLE, 1, 3)
    found = made(row, [lone])
    for pair in pairs(WHOLE):
        assert factors.relative(factors.dense(pair, found), factors.dense(pair, START + lone.vector)) < 1e-6
    np.testing.assert_allclose(found[-3:], (START + lone.vector)[-3:], atol=1e-7)


@every
def test_the_order_of_the_devices_does_not_matter(row: str) -> None:
    updates = [factors.update(WHOLE, n, n, rank) for n, rank in ((1, None), (2, None), (3, 2), (4, 1))]
    one, other = made(row, updates), made(row, updates[::-1])
    for pair in pairs(WHOLE):
        assert factors.relative(factors.dense(pair, one), factors.dense(pair, other)) < 1e-6


@every
def test_more_weight_brings_the_result_nearer_to_an_update(row: str) -> None:
    one, other = factors.update(WHOLE, 1), factors.update(WHOLE, 2)
    heavy = Update(one.vector, 9, one.portion)
    for pair in pairs(WHOLE):
        wanted = factors.dense(pair, START + one.vector)
        far = factors.relative(factors.dense(pair, made(row, [one, other])), wanted)
        assert factors.relative(factors.dense(pair, made(row, [heavy, other])), wanted) < 0.5 * far


@every
def test_what_nobody_has_learned_can_be_learned_later(row: str) -> None:
    start = factors.adapter(WHOLE, learned=False)
    still = Update(np.zeros(WHOLE.size, np.float32), 1)
    small = factors.update(WHOLE, 1, rank=2)
    for found in (made(row, [still], start=start), made(row, [small], start=start)):
        for pair in pairs(WHOLE):
            assert np.linalg.norm(pair.of(found).a, axis=1).min() > 0


@every
def test_a_module_that_nobody_tuned_stays(row: str) -> None:
    whole = factors.update(WHOLE, 1)
    portion = Portion((0, 1))
    found = made(row, [Update(portion.put(portion.take(whole.vector, WHOLE), WHOLE), 1, portion)])
    first, second = pairs(WHOLE)
    assert factors.relative(factors.dense(first, found), factors.dense(first, START)) > 0.01
    assert factors.dense(second, found).tobytes() == factors.dense(second, START).tobytes()


@every
def test_a_row_says_which_layouts_it_has_no_use_for_and_its_table_says_it_again(row: str) -> None:
    made, plain = row_of(row), Layout((Tensor("w", (4,)), Tensor("m.lora_B.weight", (4, 2), "lora_B")))
    made.check_layout(WHOLE, None)
    assert spec.build(AGGREGATORS, spec.plain(made)) == made
    if made.individual:
        with pytest.raises(SpecError, match="no module with both A and B"):
            made.check_layout(plain, None)
    else:
        made.check_layout(plain, None)


@every
def test_an_update_whose_training_diverged_is_refused(row: str) -> None:
    for bad in (2.0, -np.inf, np.nan):
        with pytest.raises(PayloadError) as caught:
            row_of(row).check(np.array([0.1, bad], np.float32))
        assert caught.value.reason is Reason.OUT_OF_RANGE
