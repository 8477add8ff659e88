from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edge_client.engines.toy import ToyBase
from edge_client.fusion import PLAIN, best_weights, fused
from edge_client.methods.lora import Lora
from edge_client.state import DeviceState
from edge_client.taken import shared_alone, taken
from experiments.simulation import Simulation
from tests.experiments.test_portions import federation, texts
from wire.delta import Layout, Vector
from wire.errors import UserError
from wire.scalars import Directions, Trajectory


def trained(keeps: str) -> Simulation:
    simulation = federation(adapter={"keeps": keeps})
    for _ in range(3):
        simulation.round(texts(simulation))
    return simulation


@pytest.fixture(scope="module")
def pairs() -> Simulation:
    return trained("pair")


def dense(layout: Layout, vector: Vector, weights: tuple[float, float]) -> np.ndarray:
    named = layout.split(vector)
    a, b, own_a, own_b = (
        named[f"base_model.model.bigram.lora_{part}.weight"].astype(np.float64)
        for part in ("A", "B", "A.personal", "B.personal")
    )
    return weights[0] * b @ a + weights[1] * own_b @ own_a


def test_each_pair_counts_its_weight(pairs: Simulation) -> None:
    view, vector = pairs.view_of("a"), pairs.adapter_of("a")
    found = dense(view.layout, fused(view, vector, (0.25, 1.5)), PLAIN)
    assert np.allclose(found, dense(view.layout, vector, (0.25, 1.5)), rtol=1e-5, atol=1e-7)
    assert np.array_equal(fused(view, vector, PLAIN), vector)


def test_the_weights_that_are_found_are_about_as_good_as_those_of_a_whole_grid(pairs: Simulation) -> None:
    view, vector, engine = pairs.view_of("a"), pairs.adapter_of("a"), pairs.engine_of("a")
    text = texts(pairs)["b"]  # another device's: its own pair is of little use there

    def loss(weights: tuple[float, float]) -> float:
        return float(engine.losses(text, [fused(view, vector, weights)])[0])

    grid = np.arange(0, 2.51, 0.125)
    best = min(loss((x, y)) for x in grid for y in grid)
    found = loss(best_weights(engine, view, vector, text, PLAIN))
    plain = loss(PLAIN)
    assert found < plain and (plain - found) > 0.8 * (plain - best)


def test_of_a_lone_factor_there_is_nothing_to_weigh() -> None:
    simulation = trained("B")
    view, vector = simulation.view_of("a"), simulation.adapter_of("a")
    assert best_weights(simulation.engine, view, vector, texts(simulation)["a"], (2.0, 2.0)) == PLAIN
    assert fused(view, vector, (2.0, 2.0)) is vector


def test_a_device_takes_home_the_release_with_its_own_pair_by_the_weights_it_kept(
    pairs: Simulation, tmp_path: Path
) -> None:
    release = Trajectory.start(Directions(), pairs.layout, pairs.adapter)
    with pytest.raises(UserError, match="no part of its own"):
        taken(pairs.run, pairs.adapter_row, ToyBase(), release, tmp_path)
    own = pairs.view_of("a").own(pairs.adapter_of("a"))
    state = DeviceState(tmp_path)
    (tmp_path / "runs" / pairs.run.name).mkdir(exist_ok=True)
    np.savez(
        tmp_path / "runs" / pairs.run.name / "own.npz", spec=np.frombuffer(pairs.run.digest.encode(), np.uint8), own=own
    )
    assert state.weights(pairs.run) == PLAIN
    state.weigh(pairs.run, (0.5, 1.25))
    state.close()
    found = taken(pairs.run, pairs.adapter_row, ToyBase(), release, tmp_path)
    assert np.array_equal(found.vector, fused(pairs.view_of("a"), pairs.adapter_of("a"), (0.5, 1.25)))


def test_what_all_devices_share_is_a_model_of_two_pairs_and_none_of_one_factor() -> None:
    two, one = (Lora(adapter={"id": "lora", "keeps": keeps}).tunes() for keeps in ("pair", "B"))
    assert shared_alone(two, ToyBase()).personal(ToyBase()) is None
    with pytest.raises(UserError, match="no model that all of them have"):
        shared_alone(one, ToyBase())
