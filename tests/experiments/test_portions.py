"""Federations whose devices send parts of an adapter, at ranks of their own, beside what they keep: on the toy base."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_client.data import Example
from edge_client.engines.toy import ToyBase, ToyEngine
from experiments.simulation import Simulation
from wire import portions, run_spec
from wire.delta import Vector
from wire.errors import SpecError
from wire.portion_rules import PORTIONS

DEVICES = ("a", "b", "c")
LORA = {"id": "lora", "rank": 4, "local_steps": 4, "batch": 2, "sequence_length": 32, "learning_rate": 0.05}


def federation(
    adapter: dict[str, Any] | None = None, ranks: dict[str, int] | None = None, **changes: Any
) -> Simulation:
    method = LORA | {"adapter": {"id": "lora", "rank": 4, **(adapter or {})}}
    table = {
        "name": "s",
        "base": {"model": "toy", "format": "toy"},
        "rounds": 9,
        "cohort": {"goal": 3},
        "method": method,
    }
    return Simulation(run_spec.parse(table | {"codec": "float32"} | changes), ToyBase(), ToyEngine, 1, None, ranks)


def texts(simulation: Simulation) -> dict[str, Any]:
    return {d: simulation.engine.tokenize([Example(f"{d}{d}x " * 30)] * 4, 32) for d in DEVICES}


def loss(simulation: Simulation) -> float:
    """Over all devices, each with what it would compute with."""
    found = []
    for device, text in texts(simulation).items():
        engine = simulation.engine_of(device)
        engine.write(simulation.adapter_of(device))
        total, count = engine.loss(text)
        found.append(total / count)
    return float(np.mean(found))


@pytest.mark.parametrize("name", sorted(PORTIONS))
def test_a_federation_learns_by_every_row_of_portions(name: str) -> None:
    simulation = federation(portions={"id": name})
    before = loss(simulation)
    for _ in range(6):
        simulation.round(texts(simulation))
    assert loss(simulation) < before - 0.3


def moved(simulation: Simulation) -> dict[str, bool]:
    before = simulation.adapter
    simulation.round(texts(simulation))
    return {name: bool(part.any()) for name, part in simulation.layout.split(simulation.adapter - before).items()}


def test_alternating_factors_move_one_at_a_time() -> None:
    simulation = federation(portions={"id": "alternate"})
    found = [tuple(moved(simulation).values()) for _ in range(4)]
    assert found == [(False, True), (True, False)] * 2


def test_what_a_fragment_did_not_send_is_sent_when_its_turn_comes() -> None:
    simulation = federation(portions={"id": "fragments", "count": 2})
    text = texts(simulation)
    start = simulation.adapter
    payload = simulation.sent("a", text["a"]).payload
    assert simulation.rules.codec is not None
    first = portions.decode(payload, simulation.rules.codec, simulation.layout)
    rest = simulation._codec_states["a"]["rest"]
    assert first.portion.chosen == (0,) and not rest[: 4 * 256].any() and rest[4 * 256 :].any()
    simulation.publish([simulation.sent(d, text[d]) for d in DEVICES])
    assert not np.array_equal(simulation.adapter, start)


def test_devices_of_smaller_rank_send_less_and_all_of_them_learn() -> None:
    simulation = federation(portions={"id": "tuned", "least_rank": 1}, ranks={"a": 1, "b": 2})
    text, before = texts(simulation), loss(simulation)
    sizes = [len(simulation.payload_of(device, text[device])) for device in DEVICES]
    assert sizes[1] / sizes[0] == pytest.approx(2, rel=0.02) and sizes[2] / sizes[0] == pytest.approx(4, rel=0.02)
    for _ in range(6):
        simulation.round(text)
    assert loss(simulation) < before - 0.3


def test_a_factor_that_devices_keep_differs_between_them_and_never_travels() -> None:
    simulation = federation(adapter={"keeps": "B"})
    before, text = loss(simulation), texts(simulation)
    sent = len(simulation.payload_of("a", text["a"]))
    for _ in range(6):
        simulation.round(text)
    assert sent < 4 * 4 * 256 + 100 and simulation.layout.size == 4 * 256
    own = [simulation.adapter_of(device)[simulation.layout.size :] for device in DEVICES]
    assert all(part.any() for part in own) and not np.array_equal(own[0], own[1])
    assert loss(simulation) < before - 0.3


def test_a_second_pair_is_a_devices_own_and_the_first_is_shared() -> None:
    simulation = federation(adapter={"keeps": "pair"})
    text = texts(simulation)
    for _ in range(3):
        simulation.round(text)
    vectors: list[Vector] = [simulation.adapter_of(device) for device in DEVICES]
    shared = simulation.layout.size
    assert all(np.array_equal(v[:shared], simulation.adapter) for v in vectors)
    assert not np.array_equal(vectors[0][shared:], vectors[1][shared:])


def test_history_is_carried_by_every_device_and_tuned_by_none() -> None:
    simulation = federation(adapter={"history": 8})
    assert simulation.run.portions == {"id": "tuned"}
    assert tuple(moved(simulation).values()) == (True, True, False, False)


@pytest.mark.parametrize("changes", [{"adapter": {"keeps": "B"}}, {"portions": {"id": "alternate"}}])
def test_scalars_go_with_neither_personal_tensors_nor_portions(changes: dict[str, Any]) -> None:
    adapter = changes.pop("adapter", {})
    method = {"id": "mezo", "adapter": {"id": "lora", "rank": 4, **adapter}}
    with pytest.raises(SpecError, match="whole adapter"):
        federation(method=method, **changes)


@pytest.mark.parametrize("adapter", [{"tuned": "B"}, {"keeps": "B"}])
def test_one_factor_does_not_alternate(adapter: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="Tune and share both"):
        federation(adapter=adapter, portions={"id": "alternate"})
