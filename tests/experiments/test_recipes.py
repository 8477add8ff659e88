"""Methods of the survey that are compositions of rows: a federation of each does what its paper's formula says."""

from __future__ import annotations

import math

import numpy as np

from tests.experiments.test_portions import DEVICES, federation, loss, texts
from wire import spec
from wire.delta import Vector

SPARSE = [{"id": "rice"}, {"id": "pack"}]


def top_k(fraction: float) -> list[spec.Plain]:
    return [{"id": "top_k", "fraction": fraction}, *SPARSE]


def test_updates_and_releases_have_densities_of_their_own_and_nothing_is_owed() -> None:
    """FLASC (arXiv 2406.05233): the largest entries up and, of what the server adds, others down; no error feedback."""
    simulation = federation(codec=top_k(0.2), downlink={"codec": top_k(0.1), "decay": 0.0})
    before, text, size = loss(simulation), texts(simulation), simulation.layout.size
    for _ in range(6):
        start = simulation.adapter
        sent = [simulation.sent(device, text[device]) for device in DEVICES]
        ups = [moved(simulation.rules.read(one.payload)) for one in sent]
        assert all(0.9 * 0.2 * size < np.count_nonzero(up) <= math.ceil(0.2 * size) for up in ups)
        simulation.publish(sent)
        step, mean = simulation.adapter - start, np.mean(ups, axis=0)
        assert np.count_nonzero(step) <= math.ceil(0.1 * size) < np.count_nonzero(mean)
        kept = step != 0
        assert np.allclose(step[kept], mean[kept], atol=1e-6)
        assert np.abs(mean[~kept]).max() <= np.abs(step[kept]).min() + 1e-6  # many are equal, after steps of AdamW
        assert all(not any(part.any() for part in state.values()) for state in simulation._codec_states.values())
    assert loss(simulation) < before - 0.2


def test_a_release_has_all_that_devices_kept_of_their_chunks_as_it_is() -> None:
    """SparseLoCo (arXiv 2508.15706): the largest of each chunk up, with error feedback that fades; down the mean of them."""
    up = [{"id": "error_feedback", "inner": [{"id": "chunk_top_k", "chunk": 256, "kept": 4}], "decay": 0.95}]
    simulation = federation(codec=[*up, {"id": "pack"}], downlink={"codec": top_k(len(DEVICES) * 4 / 256)})
    before, text = loss(simulation), texts(simulation)
    for _ in range(8):
        start = simulation.adapter
        sent = [simulation.sent(device, text[device]) for device in DEVICES]
        ups = [moved(simulation.rules.read(one.payload)) for one in sent]
        assert all((np.count_nonzero(vector.reshape(-1, 256), axis=1) <= 4).all() and vector.any() for vector in ups)
        simulation.publish(sent)
        assert np.allclose(simulation.adapter - start, np.mean(ups, axis=0), atol=1e-6)
    assert loss(simulation) < before - 0.1


def moved(update: object) -> Vector:
    vector: Vector = update.vector  # type: ignore[attr-defined]
    return vector


def test_an_outer_step_is_nesterovs_on_the_mean_of_what_devices_moved() -> None:
    """DiLoCo (arXiv 2311.08105): many inner AdamW steps, then v = m v + g and x = x + rate (g + m v), g their mean move."""
    outer = {"id": "momentum", "learning_rate": 0.7, "momentum": 0.9, "nesterov": True}
    simulation = federation(server_optimizer=outer)
    before, text = loss(simulation), texts(simulation)
    velocity = np.zeros(simulation.layout.size)
    for _ in range(5):
        start = simulation.adapter.astype(np.float64)
        sent = [simulation.sent(device, text[device]) for device in DEVICES]
        mean = np.mean([moved(simulation.rules.read(one.payload)) for one in sent], axis=0, dtype=np.float64)
        simulation.publish(sent)
        velocity = 0.9 * velocity + mean
        assert np.allclose(simulation.adapter, start + 0.7 * (mean + 0.9 * velocity), atol=2e-6)
    assert loss(simulation) < before - 0.3
