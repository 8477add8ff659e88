from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from coordinator.aggregators import SERVER_OPTIMIZERS
from coordinator.aggregators.mean import SLAB, FixedPointSum, Mean
from coordinator.aggregators.server_optimizers import Adam, Average, Momentum
from coordinator.aggregators.staleness import WHOLE, discount, fitted
from wire import spec
from wire.codecs import chain, kernels
from wire.codecs.compositions import INT4, INT8
from wire.delta import Delta, Layout, Tensor, Vector
from wire.errors import PayloadError, Reason, SpecError
from wire.portions import Portion

SIZE = 7
entries = st.floats(-1.75, 1.75, width=32)
updates = st.lists(st.tuples(arrays(np.float32, SIZE, elements=entries), st.integers(1, 65535)), min_size=1, max_size=6)


def flat(size: int) -> Layout:
    return Layout((Tensor("w", (size,)),))


def folded(parts: list[tuple[Vector, int]]) -> Vector:
    total = FixedPointSum(flat(SIZE))
    for vector, weight in parts:
        total.add(vector, weight)
    return total.mean()


@given(updates, st.randoms())
def test_a_mean_has_the_same_bits_in_any_order(parts: list[tuple[Vector, int]], chance: Any) -> None:
    mixed = parts[:]
    chance.shuffle(mixed)
    assert folded(parts).tobytes() == folded(mixed).tobytes()


@given(updates)
def test_a_mean_is_the_weighted_mean_to_half_a_unit_of_the_fixed_point(parts: list[tuple[Vector, int]]) -> None:
    exact = sum(v.astype(np.float64) * w for v, w in parts) / sum(w for _, w in parts)
    assert np.abs(folded(parts) - exact).max() <= 2.0**-31 + 2.0**-24 * np.abs(exact).max()


def test_the_most_that_can_arrive_does_not_overflow() -> None:
    total = FixedPointSum(flat(1))
    largest = np.array([np.nextafter(np.float32(2), np.float32(0))])
    total.add(largest, 65535)
    assert int(total._total[0]) * (1 << 15) < 1 << 63
    assert total.mean()[0] == largest[0]


@pytest.mark.parametrize("size", [1e-30, 1e-9, 1e-3, 0.5])
def test_an_entry_is_rounded_as_in_float64_whatever_its_size(size: float) -> None:
    entries = SLAB + 3
    vector = np.random.default_rng(1).normal(size=entries) * size
    vector[:4] = [1.5 * 2**-30, -0.5 * 2**-30, 2 - 2**-23, -2 + 2**-23]
    total, narrow = FixedPointSum(flat(entries)), vector.clip(-1.75, 2 - 2**-23).astype(np.float32)
    for weight in (1, 65535):
        total.add(narrow, weight)
    assert (total._total == np.rint(narrow.astype(np.float64) * 2**30).astype(np.int64) * 65536).all()


@pytest.mark.parametrize("bad", [2.0, -2.0, 1e30, np.inf])
def test_an_entry_that_the_fixed_point_cannot_hold_is_refused(bad: float) -> None:
    with pytest.raises(PayloadError) as caught:
        Mean().check(np.array([0.1, bad], np.float32))
    assert caught.value.reason is Reason.OUT_OF_RANGE


@pytest.mark.parametrize("row", sorted(SERVER_OPTIMIZERS))
def test_every_server_optimizer_moves_along_the_delta_and_keeps_its_state_in_one_vector(row: str) -> None:
    optimizer = spec.build(SERVER_OPTIMIZERS, {"id": row})
    delta = np.array([1, -1, 0.5, -0.5, 0.25, -2, 0], np.float32)
    state = np.zeros(optimizer.state_size(SIZE), np.float32)
    step, after = optimizer.step(delta, state)
    assert step.dtype == after.dtype == np.float32
    assert after.shape == state.shape
    assert np.array_equal(np.sign(step), np.sign(delta))
    assert not state.any()
    assert spec.build(SERVER_OPTIMIZERS, spec.plain(optimizer)) == optimizer


def test_plain_average_steps_by_the_mean_delta() -> None:
    delta = np.array([0.5, -0.5], np.float32)
    assert Average().step(delta, np.zeros(0, np.float32))[0].tolist() == [0.5, -0.5]


def test_momentum_follows_its_paper_for_three_rounds() -> None:
    for nesterov in (False, True):
        row = Momentum(learning_rate=0.7, momentum=0.9, nesterov=nesterov)
        adapter, state, velocity, expected = np.zeros(1, np.float32), np.zeros(1, np.float32), 0.0, 0.0
        for d in (1.0, -0.5, 0.25):
            step, state = row.step(np.array([d], np.float32), state)
            adapter = adapter + step
            velocity = 0.9 * velocity + d
            expected += 0.7 * (d + 0.9 * velocity if nesterov else velocity)
        assert adapter[0] == pytest.approx(expected, rel=1e-5)


def test_adam_follows_its_paper_for_three_rounds() -> None:
    row = Adam(learning_rate=0.1, beta1=0.9, beta2=0.99, epsilon=1e-3)
    adapter, state = np.zeros(1, np.float32), np.zeros(2, np.float32)
    m = v = x = 0.0
    for d in (1.0, -0.5, 0.25):
        step, state = row.step(np.array([d], np.float32), state)
        adapter = adapter + step
        m, v = 0.9 * m + 0.1 * d, 0.99 * v + 0.01 * d * d
        x += 0.1 * m / (v**0.5 + 1e-3)
    assert adapter[0] == pytest.approx(x, rel=1e-5)


@pytest.mark.parametrize(
    "wrong",
    [{"id": "median"}, {"id": "momentum", "momentum": 1.5}, {"id": "adam", "epsilon": 0}, {"id": "adam", "b": 1}],
)
def test_a_server_optimizer_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SpecError):
        spec.build(SERVER_OPTIMIZERS, wrong, "server_optimizer")


def test_rows_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Average().learning_rate = 2.0  # type: ignore[misc]


def test_a_discount_is_the_nearest_integer_to_two_to_the_sixteen_over_the_root() -> None:
    assert all(abs(discount(s) - WHOLE / (1 + s) ** 0.5) <= 0.5 for s in range(1001))


@given(st.lists(st.tuples(st.integers(1, 65535), st.integers(0, 1000)), min_size=1, max_size=8))
def test_the_weights_of_a_buffer_fit_the_fixed_point_and_keep_their_ratios(parts: list[tuple[int, int]]) -> None:
    exact = [examples * discount(staleness) for examples, staleness in parts]
    weights = fitted(exact)
    assert all(1 <= weight <= 65535 for weight in weights)
    unit = max(exact) / max(weights)
    assert all(abs(weight - one / unit) <= 2 for weight, one in zip(weights, exact, strict=True))


@pytest.mark.parametrize("large", [0, 1 << 62])
def test_a_sum_of_parts_has_the_bits_of_the_sum_of_the_whole(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LARGE", large)
    layout = Layout((Tensor("a", (7, 50)), Tensor("b", (40, 7)), Tensor("c", (9,))))
    whole, parts = FixedPointSum(layout), FixedPointSum(layout)
    for weight in (1, 3, 65535):
        vector = np.random.default_rng(weight).uniform(-1.9, 1.9, layout.size).astype(np.float32)
        whole.add(vector, weight)
        turned = ((place, np.asfortranarray(vector[place].reshape(t.shape))) for t, place in layout.slices())
        parts.add_parts(turned, weight)
    assert parts.mean().tobytes() == whole.mean().tobytes()
    assert (parts._total == whole._total).all()


ROWS: dict[str, Any] = {"int4": INT4, "int8": INT8, "nf4": {"id": "normal_float"}}
ODD = Layout((Tensor("a", (7, 51)), Tensor("b", (40, 8)), Tensor("c", (10,))))


@pytest.mark.parametrize("large", [0, 1 << 62])
@pytest.mark.parametrize("block", [64, 5, 9000])
@pytest.mark.parametrize("row", ["int4", "int8", "nf4"])
def test_adding_codes_has_the_bits_of_adding_what_they_decode_to(
    row: str, block: int, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "LARGE", large)
    whole, coded = FixedPointSum(ODD), FixedPointSum(ODD)
    made = chain.codec([{"id": "error_feedback", "inner": [ROWS[row] | {"block": block}]}, {"id": "pack"}])
    for weight, scale in ((1, 1e-6), (3, 1e-3), (65535, 1.9)):
        vector = np.random.default_rng(weight).uniform(-scale, scale, ODD.size).astype(np.float32)
        payload, _ = made.encode(Delta(ODD, vector), made.init(ODD))
        whole.add(made.decode(payload, ODD).vector, weight)
        assert coded.add_coded(made, payload, ODD, weight)
    assert coded.mean().tobytes() == whole.mean().tobytes()
    assert (coded._total == whole._total).all()


@pytest.mark.parametrize("large", [0, 1 << 62])
@pytest.mark.parametrize("row", ["int4", "int8", "nf4"])
def test_codes_that_are_not_decoded_are_not_added_either(row: str, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LARGE", large)
    made, random = chain.codec([ROWS[row], {"id": "pack"}]), np.random.default_rng(3)
    payload, _ = made.encode(Delta(ODD, random.uniform(-1, 1, ODD.size).astype(np.float32)), {})
    refused = 0
    for at in range(chain.HEADER_BYTES, len(payload)):
        bad = bytearray(payload)
        bad[at] = int(random.choice([0, 8, 128, 124, 252, 255]))
        added = _said(functools.partial(FixedPointSum(ODD).add_coded, made, bytes(bad), ODD, 1))
        assert added == _said(functools.partial(made.decode, bytes(bad), ODD))
        refused += added is not None
    assert refused


def _said(work: Callable[[], object]) -> Reason | None:
    try:
        work()
    except PayloadError as error:
        return error.reason
    return None


PARTED = Layout(
    (
        Tensor("a", (3, 2), "lora_A"),
        Tensor("b", (2, 3), "lora_B"),
        Tensor("r", (3, 3), "core"),
        Tensor("g", (2,), "gain"),
    )
)


def test_an_entry_is_the_mean_of_those_that_sent_it_and_stays_where_nobody_did() -> None:
    sent = [(Portion((0, 1, 2)), 1, 1.0), (Portion((0, 1, 2), 2), 3, 0.5), (Portion((0,), 1), 4, -1.0)]
    total = FixedPointSum(PARTED)
    for portion, weight, value in sent:
        ones = np.full(portion.layout(PARTED).size, value, np.float32)
        total.add(portion.put(ones, PARTED), weight, portion)
    mean = PARTED.split(total.mean())
    first, second, third = (1 + 1.5 - 4) / 8, 2.5 / 4, 1.0
    np.testing.assert_allclose(mean["a"], [[first] * 2, [second] * 2, [third] * 2], atol=2.0**-30)
    np.testing.assert_allclose(mean["b"], [[second, second, third]] * 2, atol=2.0**-30)
    assert mean["r"][0, 2] == third and mean["r"][1, 1] == second and not mean["g"].any()
