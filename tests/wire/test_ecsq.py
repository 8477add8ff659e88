"""What the flagship codec promises: its rate, its distance from the bound, the same bytes from both kinds of kernels."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.aggregators.products import Update, aggregation_error
from wire.codecs import chain, kernels, kernels_numba, rank_rows, rans
from wire.codecs.compositions import BALANCE, ROTATION, ecsq
from wire.codecs.kernels import SYMBOLS, TOTAL
from wire.codecs.rank_rotate import RankRotate
from wire.delta import Delta, Layout, Tensor
from wire.errors import PayloadError

LAYOUT = Layout((Tensor("a", (16, 900), "lora_A"), Tensor("b", (700, 16), "lora_B"), Tensor("c", (300,), "gain")))
LARGE = Layout((Tensor("a", (16, 9000), "lora_A"), Tensor("b", (8000, 16), "lora_B")))


def gaussian(layout: Layout, seed: int = 0, directions: int = 0) -> Delta:
    """Gaussian entries, tensors of different scales; with `directions`, most of the energy in so many across the rank axis."""
    chance = np.random.default_rng(seed)
    vector = chance.standard_normal(layout.size).astype(np.float32)
    for number, (tensor, place) in enumerate(layout.slices()):
        if directions and len(tensor.shape) == 2:
            rows, columns = rank_rows.grid(tensor)
            common = chance.standard_normal((rows, directions)) @ chance.standard_normal((directions, columns))
            mixed = vector[place].reshape(rows, columns) + 3 * common
            vector[place] = (mixed.T if tensor.role == "lora_B" else mixed).reshape(-1)
        vector[place] *= 0.01 * 2.0 ** (number % 3)
    return Delta(layout, vector)


def codec(bits: float, *before: Any, states: int | None = None) -> chain.Chain:
    return chain.codec([*before, {"id": "ecsq", "target_bits": bits, "states": states}, {"id": "pack"}])


def lost(delta: Delta, bits: float, *before: Any, states: int | None = None) -> tuple[float, float]:
    """Bits a parameter and the relative squared error of one update."""
    made = codec(bits, *before, states=states)
    payload, _ = made.encode(delta, {})
    error = made.decode(payload, delta.layout).vector - delta.vector
    return 8 * len(payload) / delta.layout.size, float(np.square(error).sum() / np.square(delta.vector).sum())


def bound(delta: Delta, relative: float) -> float:
    """Bits a parameter that Gaussian tensors of these variances need for a relative squared error: reverse water-filling."""
    parts = [delta.vector[place] for _, place in delta.layout.slices()]
    variances, sizes = np.array([np.square(p).mean() for p in parts]), np.array([p.size for p in parts])
    levels = np.geomspace(1e-9 * variances.max(), variances.max(), 20_000)
    reached = (np.minimum(levels[:, None], variances) * sizes).sum(axis=1) / (variances * sizes).sum()
    level = levels[np.argmin(np.abs(reached - relative))]
    return float((sizes * np.maximum(0, 0.5 * np.log2(variances / level))).sum() / sizes.sum())


@pytest.fixture(params=["numpy", "numba"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(kernels, "LARGE", 1 << 62 if request.param == "numpy" else 0)
    return str(request.param)


@pytest.mark.parametrize("states", [None, 8])
@pytest.mark.parametrize("bits", [0.3, 0.5, 1.0, 2.0, 3.0, 4.0])
def test_an_update_has_its_target_and_at_most_two_percent_less(bits: float, states: int | None) -> None:
    for delta in (gaussian(LARGE), gaussian(LARGE, 1, directions=2)):
        found, _ = lost(delta, bits, states=states)
        assert 0.98 * bits <= found <= bits + 160 / LARGE.size


def signs(many: int) -> Delta:
    """Sums of `many` signs of one size, as that many steps of a sign-like optimizer make them."""
    chance = np.random.default_rng(many)
    steps = chance.integers(0, 2, (many, LARGE.size)) * 2 - 1
    return Delta(LARGE, (1e-3 * steps.sum(axis=0)).astype(np.float32))


@pytest.mark.parametrize("before", [[], [ROTATION]])
@pytest.mark.parametrize("states", [None, 8])
@pytest.mark.parametrize("many", [1, 2])
def test_where_bits_leap_with_the_step_more_of_them_still_err_less(many: int, states: int | None, before: Any) -> None:
    found = [lost(signs(many), bits, *before, states=states) for bits in (0.2, 0.5, 1.0, 2.0, 4.0, 10.0)]
    errors = [error for _, error in found]
    assert all(later <= 1.01 * earlier + 1e-8 for earlier, later in pairwise(errors))
    assert errors[0] < 0.9 and errors[1] < 0.75 and errors[3] < 0.1 and errors[5] < 2e-4


@pytest.mark.parametrize("states", [None, 8])
def test_tensors_of_far_apart_scales_take_as_many_bits_as_symbols_allow(states: int | None) -> None:
    scales = np.repeat([1e-3, 1e-2, 1e-1, 1.0, 0.0], 16 * 900)
    made = Layout(tuple(Tensor(str(n), (16, 900), "lora_A") for n in range(5)))
    delta = Delta(made, (np.random.default_rng(2).standard_normal(made.size) * scales).astype(np.float32))
    found = [lost(delta, bits, states=states) for bits in (2.0, 3.0, 4.0, 8.0)]
    assert all(later <= 1.1 * earlier for (_, earlier), (_, later) in pairwise(found))
    assert found[2][0] > 3.5 and found[2][1] < 5e-5


@pytest.mark.parametrize("name", ["rotated_ecsq", "balanced_ectcq", "ecsq"])
@pytest.mark.parametrize(
    "tensor", [Tensor("z", (64,), "other"), Tensor("p", (16, 576), "prompt"), Tensor("a", (8, 256), "lora_A")]
)
def test_of_a_small_adapter_something_arrives_every_time(name: str, tensor: Tensor) -> None:
    made, small = chain.codec(name), Layout((tensor,))
    state = made.init(small)
    for seed in range(3):
        payload, state = made.encode(gaussian(small, seed), state)
        assert made.decode(payload, small).vector.any()


@pytest.mark.parametrize("share", [0.25, 1.0, 4.0])
def test_a_chain_decodes_what_another_rate_of_it_encodes(share: float) -> None:
    made, delta = chain.codec(ecsq(0.5, ROTATION)), gaussian(LARGE)
    rated = made.rated(share)
    payload, _ = rated.encode(delta, rated.init(LARGE))
    assert 8 * len(payload) / LARGE.size == pytest.approx(0.5 * share, rel=0.05)
    assert np.array_equal(made.decode(payload, LARGE).vector, rated.decode(payload, LARGE).vector)
    assert (rated is made) == (share == 1.0)


def test_a_chain_without_a_target_is_itself_at_every_rate() -> None:
    made = chain.codec("int8")
    assert made.rated(2.0) is made


def test_a_target_in_bytes_counts_everything_but_the_header() -> None:
    delta, wanted = gaussian(LARGE), 20_000
    made = chain.codec([ROTATION, {"id": "ecsq", "target_bytes": wanted}, {"id": "pack"}])
    payload, _ = made.encode(delta, {})
    assert 0.98 * wanted <= len(payload) - chain.HEADER_BYTES <= wanted


@pytest.mark.parametrize("bits", [0.3, 0.5, 1.0, 2.0, 4.0])
def test_it_is_within_0_27_bits_of_the_bound_on_gaussian_tensors(bits: float) -> None:
    delta = gaussian(LARGE)  # scalar quantization loses 0.2546 at high rates, on what is Gaussian in every respect
    found, relative = lost(delta, bits)
    assert -0.01 <= found - bound(delta, relative) <= 0.27


@pytest.mark.parametrize("bits", [0.3, 0.5, 1.0, 2.0, 4.0])
def test_along_a_trellis_it_is_within_0_14_bits_of_the_bound_on_gaussian_tensors(bits: float) -> None:
    delta = gaussian(LARGE)
    found, relative = lost(delta, bits, states=8)
    assert -0.01 <= found - bound(delta, relative) <= 0.14
    assert relative < lost(delta, bits)[1]


@pytest.mark.parametrize("bits", [0.3, 0.5, 1.0, 2.0])
def test_turned_it_is_below_the_bound_where_energy_lies_along_two_directions(bits: float) -> None:
    delta = gaussian(LARGE, 2, directions=2)
    found, relative = lost(delta, bits, ROTATION)
    assert found - bound(delta, relative) < -0.3


def test_rows_and_columns_come_back_where_they_were() -> None:
    delta = gaussian(LAYOUT)
    ordered = rank_rows.gathered(delta.vector, LAYOUT.tensors)
    np.testing.assert_array_equal(rank_rows.scattered(ordered, LAYOUT.tensors), delta.vector)
    second = delta.layout.split(delta.vector)["b"]
    np.testing.assert_array_equal(ordered[16 * 900 : 16 * 900 + 700], second[:, 0])


def test_balancing_rounds_nothing() -> None:
    delta, made = gaussian(LAYOUT), chain.codec([BALANCE, {"id": "pack"}])
    payload, _ = made.encode(delta, {})
    np.testing.assert_array_equal(made.decode(payload, LAYOUT).vector, delta.vector)


def test_balanced_steps_leave_less_of_the_error_of_a_product_whose_first_factor_is_small() -> None:
    layout = Layout((Tensor("m.lora_A.weight", (16, 900), "lora_A"), Tensor("m.lora_B.weight", (700, 16), "lora_B")))
    chance = np.random.default_rng(5)
    start = np.concatenate([chance.standard_normal(16 * 900), np.zeros(700 * 16)]).astype(np.float32)
    delta = Delta(layout, (chance.standard_normal(layout.size) / 8).astype(np.float32))

    def missed(*before: Any) -> float:
        made = codec(1.0, *before)
        arrived = made.decode(made.encode(delta, {})[0], layout).vector
        found = aggregation_error(layout, start, start + arrived, [Update(delta.vector, 1)])
        assert found is not None
        return found**2

    assert missed(BALANCE) < 0.6 * missed()


def test_turning_and_turning_back_changes_entries_by_rounding_alone(kernel: str) -> None:
    delta, stage, like = gaussian(LAYOUT, 3, directions=1), RankRotate(), chain.shape(LAYOUT)
    turned, _ = stage.encode({"values": delta.vector}, {}, like)
    np.testing.assert_allclose(np.square(turned["values"]).sum(), np.square(delta.vector).sum(), rtol=1e-5)
    assert np.square(turned["values"][:900]).sum() > 0.8 * np.square(delta.vector[: 16 * 900]).sum()
    np.testing.assert_allclose(stage.decode(turned, like)["values"], delta.vector, atol=1e-6)


@pytest.mark.parametrize("states", [None, 8])
@pytest.mark.parametrize("bits", [0.5, 3.0, 9.0])
def test_numpy_and_numba_write_the_same_bytes_and_read_the_same_floats(
    bits: float, states: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    delta, made = gaussian(LAYOUT, 4, directions=2), codec(bits, ROTATION, states=states)
    found = []
    for large in (1 << 62, 0):
        monkeypatch.setattr(kernels, "LARGE", large)
        payload, _ = made.encode(delta, {})
        found.append((payload, made.decode(payload, LAYOUT).vector.tobytes()))
    assert found[0] == found[1]


@pytest.mark.parametrize("states", [None, 8])
def test_entries_a_thousand_times_the_rest_are_told_apart(kernel: str, states: int | None) -> None:
    delta = gaussian(LAYOUT, 5)
    delta.vector[::1009] *= 1000
    made = codec(8.0, states=states)
    decoded = made.decode(made.encode(delta, {})[0], LAYOUT).vector
    np.testing.assert_allclose(decoded[::1009], delta.vector[::1009], rtol=0.01)


@pytest.mark.parametrize("states", [None, 8])
@pytest.mark.parametrize("value", [0.0, 1e-38, 1.0])
def test_vectors_without_any_spread_are_coded(value: float, states: int | None) -> None:
    made = codec(1.2, states=states)
    decoded = made.decode(made.encode(Delta(LAYOUT, np.full(LAYOUT.size, value, np.float32)), {})[0], LAYOUT)
    off = 0.01 if states is None else 0.03  # a path begins where it begins: the first entry of a lane may pay for it
    np.testing.assert_allclose(decoded.vector, value if value > 1e-30 else 0.0, atol=off)


counts = st.lists(st.integers(0, 5000), min_size=SYMBOLS, max_size=SYMBOLS)


@given(counts.filter(any))
def test_frequencies_add_up_and_nothing_that_occurs_has_none(found: list[int]) -> None:
    frequencies = rans.normalized(np.array(found))
    assert frequencies.sum() == TOTAL and (frequencies[np.array(found) > 0] > 0).all()
    np.testing.assert_array_equal(frequencies[1:255:2], frequencies[2:255:2])


@pytest.mark.parametrize("module", [kernels, kernels_numba])
def test_the_coder_takes_what_an_independent_one_takes(module: Any) -> None:
    import constriction

    size, chance = 200_000, np.random.default_rng(6)
    symbols = np.minimum(np.abs(chance.standard_normal(size) * 3), 200).astype(np.uint8)
    frequencies = rans.spread(np.bincount(symbols, minlength=SYMBOLS))
    one = np.zeros(1, np.int64)
    words = module.encode(symbols, one, one + size, one, frequencies[None], 32)
    model = constriction.stream.model.Categorical((frequencies / TOTAL).astype(np.float32), perfect=False)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(symbols.astype(np.int32), model)
    assert abs(16 * len(words) - coder.num_bits()) <= 0.001 * coder.num_bits() + 32 * 32
    reader = rans.Reader(words, 32, size)
    rows = rank_rows.RankRows(one, one + size)
    read = reader.read(rows, one, rans.lookup(frequencies[None]), np.arange(SYMBOLS, dtype=np.uint8)[None])
    reader.close()
    np.testing.assert_array_equal(read, symbols)


@pytest.mark.parametrize("states", [None, 8])
def test_a_payload_with_one_word_missing_or_added_is_refused(kernel: str, states: int | None) -> None:
    delta, made = gaussian(LAYOUT), codec(3.0, states=states)
    payload, _ = made.encode(delta, {})
    for bad in (payload[:-2], payload + b"\0\0"):
        with pytest.raises(PayloadError):
            made.decode(bad, LAYOUT)


@pytest.mark.parametrize("states", [None, 8])
@pytest.mark.parametrize("before", [[], [ROTATION], [BALANCE], [BALANCE, ROTATION]])
def test_tensor_after_tensor_it_decodes_to_the_same_bits(kernel: str, before: list[Any], states: int | None) -> None:
    delta = gaussian(LAYOUT, 7, directions=2)
    inner = [*before, {"id": "ecsq", "target_bits": 3.0, "states": states}]
    made = chain.codec([{"id": "error_feedback", "inner": inner}, {"id": "pack"}])
    payload, _ = made.encode(delta, made.init(LAYOUT))
    whole, parts = made.decode(payload, LAYOUT).vector, made.parts(payload, LAYOUT)
    assert parts is not None
    for (tensor, place), (found, values) in zip(LAYOUT.slices(), parts, strict=True):
        assert place == found and values.shape == tensor.shape
        np.testing.assert_array_equal(values.reshape(-1), whole[place])
    assert (
        chain.codec("top_k_int4").parts(chain.codec("top_k_int4").encode(delta, {"0.residual": whole})[0], LAYOUT)
        is None
    )
