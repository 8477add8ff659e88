"""The codecs that the flagship is compared with do what their papers say."""

from __future__ import annotations

from statistics import NormalDist
from typing import Any

import numpy as np
import pytest

from wire.codecs import Fields, FieldShape, chain
from wire.codecs.normal_float import NormalFloat
from wire.codecs.projection import Projection
from wire.delta import Delta, Layout, Tensor, Vector
from wire.errors import PayloadError, Reason, SpecError

SIZE = 1 << 16
LAYOUT = Layout((Tensor("a", (SIZE,)),))
PACK: Any = {"id": "pack"}
ENTROPY: Any = {"id": "entropy"}


def normal(seed: int = 0) -> Vector:
    return np.random.default_rng(seed).standard_normal(SIZE).astype(np.float32)


def through(vector: Vector, *stages: Any) -> tuple[float, Vector]:
    """Bits an entry, and what arrives."""
    codec = chain.codec([*stages, PACK])
    payload, _ = codec.encode(Delta(LAYOUT, vector), codec.init(LAYOUT))
    return 8 * len(payload) / SIZE, codec.decode(payload, LAYOUT).vector


def error(vector: Vector, arrived: Vector) -> float:
    return float(np.square(arrived - vector).sum() / np.square(vector).sum())


@pytest.mark.parametrize(
    ("stages", "bits", "expected"),
    [
        ([{"id": "sign"}], 1.01, 1 - 2 / np.pi),
        ([{"id": "eden", "bits": 1}], 1.01, 1 - 2 / np.pi),
        ([{"id": "eden", "bits": 1, "unbiased": True}], 1.01, np.pi / 2 - 1),
        ([{"id": "eden", "bits": 2}], 2.01, 0.1175),
        ([{"id": "eden", "bits": 4}], 4.01, 0.0095),
        ([{"id": "ternary"}, ENTROPY], 1.63, 0.195),
        ([{"id": "normal_float"}], 4.26, 0.0084),
        ([{"id": "dither", "relative": 1.0}, ENTROPY], 2.25, 1 / 12),
        ([{"id": "random_k", "fraction": 0.25}], 8.01, 0.75),
        ([{"id": "projection", "fraction": 0.25}], 8.01, 0.8),
        ([{"id": "projection", "fraction": 0.25, "unbiased": True}], 8.01, 4.0),
    ],
)
def test_on_normal_entries_rate_and_error_are_what_theory_says(stages: Any, bits: float, expected: float) -> None:
    vector = normal()
    found, arrived = through(vector, *stages)
    assert found <= bits + 0.02
    assert error(vector, arrived) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(
    "stages",
    [
        [{"id": "qsgd", "levels": 16, "bucket": 512}, ENTROPY],
        [{"id": "dither", "relative": 2.0}, ENTROPY],
        [{"id": "eden", "bits": 1, "unbiased": True, "block": 256}],
    ],
)
def test_an_unbiased_row_is_right_in_the_mean_over_many_draws(stages: Any) -> None:
    vector, total, draws = normal(), np.zeros(SIZE), 40
    for draw in range(draws):
        scaled = vector * np.float32(1 + draw * 2.0**-12)  # another seed follows from other values
        total += through(scaled, *stages)[1] / (1 + draw * 2.0**-12)
    single = error(vector, through(vector, *stages)[1])
    assert error(vector, (total / draws).astype(np.float32)) < 2.5 * single / draws


def test_qsgd_errs_no_more_than_its_bound() -> None:
    vector = normal()
    _, arrived = through(vector, {"id": "qsgd", "levels": 16, "bucket": 512}, ENTROPY)
    assert 0.3 < error(vector, arrived) < min(512 / 16**2, np.sqrt(512) / 16)


def test_chunks_keep_their_largest_in_fourteen_bits_each() -> None:
    vector = normal()
    bits, arrived = through(vector, {"id": "chunk_top_k"})
    assert bits == pytest.approx(64 * 14 / 4096 + 32 / 4096, abs=0.01)
    for chunk, found in zip(vector.reshape(-1, 4096), arrived.reshape(-1, 4096), strict=True):
        largest = set(np.argsort(-np.abs(chunk))[:64].tolist())
        assert set(np.flatnonzero(found).tolist()) == largest
        assert (np.sign(found[found != 0]) == np.sign(chunk[found != 0])).all()


def test_projections_of_many_seeds_have_the_update_as_their_mean() -> None:
    vector, total, draws = normal(), np.zeros(SIZE), 40
    stages = [{"id": "projection", "fraction": 0.25, "unbiased": True, "seed": seed} for seed in range(draws)]
    for stage in stages:
        total += through(vector, stage)[1]
    assert error(vector, (total / draws).astype(np.float32)) == pytest.approx(4.0 / draws, rel=0.05)


def test_directions_are_normal_numbers_that_are_cut_off() -> None:
    drawn = np.sort(Projection(1.0, block=16, seed=3)._directions().reshape(-1))
    points = (np.arange(drawn.size) + 0.5) / drawn.size
    below = NormalDist().cdf
    share = [(below(x) - below(-0.25)) / (below(0.25) - below(-0.25)) for x in drawn.tolist()]
    assert np.abs(np.array(share) - points).max() < 1.63 / 16  # Kolmogorov and Smirnov: once in a hundred for 256 draws


@pytest.mark.parametrize(
    "stage",
    [
        {"id": "random_k", "fraction": 0.1},
        {"id": "count_sketch", "fraction": 0.3, "rows": 1},
        {"id": "projection", "fraction": 0.1},
    ],
)
def test_a_linear_row_decodes_a_sum_to_the_sum(stage: Any) -> None:
    first, second = normal(1), normal(2)
    both = through(first, stage)[1] + through(second, stage)[1]
    np.testing.assert_allclose(through(first + second, stage)[1], both, atol=1e-3)


def test_a_sketch_finds_the_few_that_are_large() -> None:
    vector = normal(3) * np.float32(0.01)
    vector[[5, 700, 40_000]] = [3.0, -2.0, 4.0]
    _, arrived = through(vector, {"id": "count_sketch", "fraction": 0.2, "rows": 5})
    np.testing.assert_allclose(arrived[[5, 700, 40_000]], [3.0, -2.0, 4.0], atol=0.3)


def test_seeds_that_are_sent_differ_between_updates_and_are_the_same_again_for_the_same() -> None:
    first = through(normal(1), {"id": "dither"}, ENTROPY)[1] - normal(1)
    second = through(normal(2), {"id": "dither"}, ENTROPY)[1] - normal(2)
    assert abs(float(np.corrcoef(first, second)[0, 1])) < 0.02
    np.testing.assert_array_equal(through(normal(1), {"id": "dither"}, ENTROPY)[1] - normal(1), first)


@pytest.mark.parametrize(
    ("scale", "reason"), [(-1.0, Reason.BAD_PAYLOAD), (np.inf, Reason.NOT_FINITE), (np.nan, Reason.NOT_FINITE)]
)
def test_a_scale_of_normal_floats_that_no_encoder_writes_is_refused_however_it_is_read(
    scale: float, reason: Reason
) -> None:
    stage, like, total = NormalFloat(64), {"values": FieldShape("float32", 64)}, np.zeros(64, np.int64)
    fields: Fields = {"scales": np.array([scale], np.float16), "codes": np.zeros(32, np.uint8)}
    for read in (lambda: stage.decode(fields, like), lambda: stage.add(fields, like, total, 24, 1)):
        with pytest.raises(PayloadError) as caught:
            read()
        assert caught.value.reason is reason
    assert not total.any()


@pytest.mark.parametrize("stage", ["blockwise", "normal_float", "sign", "ternary"])
def test_a_block_that_cannot_be_is_refused_where_it_is_named(stage: str) -> None:
    for block in (0, (1 << 20) + 1):
        with pytest.raises(SpecError, match="block must lie between 1 and"):
            chain.codec([{"id": stage, "block": block}, PACK])
