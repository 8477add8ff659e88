"""Updates in scalars: what travels comes back, garbage is refused by name, and every backend walks the same way."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_client.engines import torch_directions
from wire import prng, scalars
from wire.delta import Layout, Tensor
from wire.errors import PayloadError
from wire.scalars import Directions, Scalars, Step, Trajectory
from wire.subspace import Subspace

LAYOUT = Layout((Tensor("w", (30, 40)),))
ROWS = [
    Directions("round", 40, 8),
    Directions("round", 40, 16, curvature=0.2),
    Directions("device", 40, 32),
    Directions("pool", 4096, 16),
    Directions("device", 40, 16, subspace=Subspace("subzero", 3, 2)),
    Directions("round", 40, 16, subspace=Subspace("lozo", 2, 3)),
]


def multiples(
    directions: Directions, seed: int = 0, size: float = 1e-2
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    chance = np.random.Generator(np.random.Philox(key=seed))
    drawn = size * chance.standard_normal(directions.count)
    if directions.drawn == "pool":
        drawn[chance.permutation(directions.count)[200:]] = 0
    return drawn


@pytest.mark.parametrize("directions", ROWS, ids=str)
def test_multiples_come_back_to_the_precision_that_was_chosen(directions: Directions) -> None:
    wanted = multiples(directions)
    sent = Scalars.of(directions, wanted)
    payload = sent.encode(LAYOUT)
    found = scalars.decode(payload, directions, LAYOUT)
    assert len(payload) <= directions.max_bytes()
    assert np.array_equal(found.units, sent.units)
    step = np.abs(wanted).max() / (2 ** (directions.bits - 1) - 1)
    assert np.abs(found.units / 2**30 - wanted).max() <= max(step, 2.0**-30)


def test_sixty_four_directions_take_151_bytes_and_200_of_a_pool_823() -> None:
    sixty_four = Directions("round", 64, 16)
    assert len(Scalars.of(sixty_four, multiples(sixty_four)).encode(LAYOUT)) == 151
    pool = ROWS[3]
    assert len(Scalars.of(pool, multiples(pool)).encode(LAYOUT)) == 823


@pytest.mark.parametrize("bad", [2.0, -2.5, float("inf"), float("nan")])
def test_a_multiple_that_has_diverged_is_not_said(bad: float) -> None:
    with pytest.raises(ValueError, match="2 or more"):
        Scalars.of(Directions("round", 2), np.array([0.0, bad]))


@pytest.mark.parametrize("directions", ROWS, ids=str)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_garbage_is_refused_or_is_an_update(directions: Directions, data: st.DataObject) -> None:
    payload = bytearray(Scalars.of(directions, multiples(directions)).encode(LAYOUT))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(payload[: data.draw(st.integers(0, len(payload)))])
    for garbage in (bytes(payload), cut):
        try:
            found = scalars.decode(garbage, directions, LAYOUT)
        except PayloadError:
            continue
        assert np.abs(found.units).max(initial=0) < scalars.LIMIT


def test_an_update_along_other_directions_or_of_another_layout_is_refused_by_name() -> None:
    payload = Scalars.of(ROWS[0], multiples(ROWS[0])).encode(LAYOUT)
    with pytest.raises(PayloadError) as other:
        scalars.decode(payload, Directions("round", 40, 8, curvature=0.1), LAYOUT)
    assert other.value.reason.value == "WRONG_CODEC"
    with pytest.raises(PayloadError) as elsewhere:
        scalars.decode(payload, ROWS[0], Layout((Tensor("v", (3,)),)))
    assert elsewhere.value.reason.value == "WRONG_LAYOUT"


@pytest.mark.parametrize("directions", ROWS, ids=str)
def test_a_step_survives_its_bytes(directions: Directions) -> None:
    units = Scalars.of(directions, multiples(directions)).units
    step = Step(((7, units), (2**64 - 1, -units)))
    again = Step.parse(step.to_bytes(), directions)
    assert [key for key, _ in again.strands] == [7, 2**64 - 1]
    assert np.array_equal(again.strands[1][1], -units)
    for broken in (b"", step.to_bytes()[:-1], step.to_bytes() + b"x", b"ETR0" + step.to_bytes()[4:]):
        with pytest.raises(PayloadError):
            Step.parse(broken, directions)


GOLDEN = {
    "5ee68962": "2b1a021ed8da941a",
    "53dfc5d6": "5fecb229b36dc92f",
    "c1a9734f": "df10987910ce2069",
    "2eca6483": "94e75ed9dddf24af",
    "f0902ce3": "c62cde46c4d21841",
    "77965826": "eb6f3e8348d24af5",
}
NAMES = ["round", "curvature", "device", "pool", "subzero", "lozo"]


@pytest.mark.parametrize("directions", ROWS, ids=NAMES)
def test_numpy_numba_and_torch_walk_to_the_same_adapter(directions: Directions) -> None:
    """The digests are golden: what a run of scalars leads to is for ever."""
    initial = np.linspace(-1, 1, LAYOUT.size, dtype=np.float32)
    ends = set()
    for combine in (prng.combine_numpy, prng.combine_numba, torch_directions.combine):
        state = Trajectory.start(directions, LAYOUT, initial)
        for number in range(4):
            units = Scalars.of(directions, multiples(directions, number)).units
            state = state.after(Step(((directions.key(3, number + 1, "d"), units),)), combine)
        ends.add(hashlib.sha256(state.adapter.tobytes()).hexdigest()[:16])
    assert len(ends) == 1
    assert ends == {GOLDEN[directions.digest[:8]]}


def test_curvature_shortens_directions_where_the_run_has_moved_more_than_chance() -> None:
    directions = Directions("round", 64, 16, curvature=0.5)
    state = Trajectory.start(directions, Layout((Tensor("w", (1000,)),)), np.zeros(1000, np.float32))
    key = directions.key(0, 1, "")
    slopes = np.array([prng.signs(key, n, 1000)[0] for n in range(64)], np.float64)  # only entry 0 matters to the loss
    state = state.after(Step(((key, Scalars.of(directions, -1e-3 * slopes).units),)))
    scale = state.scale()
    assert scale is not None
    assert scale[0] == scale.min() < 256
    assert 200 < np.median(scale) < 400


def test_keys_differ_by_run_round_and_where_asked_device() -> None:
    shared, own, pool = Directions("round"), Directions("device"), Directions("pool")
    assert shared.key(1, 2, "a") == shared.key(1, 2, "b") != shared.key(1, 3, "a")
    assert own.key(1, 2, "a") != own.key(1, 2, "b")
    assert pool.key(1, 2, "a") == pool.key(1, 9, "b") != pool.key(2, 2, "a")
