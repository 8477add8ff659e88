"""A federation in one process spends what one of real processes does, bytes down included."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_client.data import Example
from edge_client.engines.toy import ToyBase, ToyEngine
from experiments.simulation import Simulation
from wire import run_spec
from wire.errors import PayloadError, Reason

LORA = {"id": "lora", "rank": 4, "local_steps": 2, "batch": 2, "sequence_length": 32, "learning_rate": 0.01}
MEZO = {"id": "mezo", "local_steps": 4, "batch": 2, "sequence_length": 32, "adapter": {"id": "lora", "rank": 4}}
WHOLE = 2 * 4 * 2 * 256 * 4
"""Bytes of an adapter of rank 4 on the toy base, for two devices."""


def played(**changes: Any) -> tuple[Simulation, list[int]]:
    """Three rounds of two devices, and the bytes down of each."""
    table = {"name": "s", "base": {"model": "toy", "format": "toy"}, "rounds": 4, "cohort": {"goal": 2}, "method": LORA}
    simulation = Simulation(run_spec.parse(table | changes), ToyBase(), ToyEngine, 1, None)
    text = simulation.engine.tokenize([Example("abc " * 30)] * 4, 32)
    return simulation, [simulation.round({"a": text, "b": text}).bytes_down for _ in range(3)]


def test_whole_adapters_cost_their_length_each_round() -> None:
    assert played()[1] == [WHOLE] * 3


def test_coded_releases_cost_what_was_added_and_lead_near_the_same_adapter() -> None:
    coded, down = played(downlink={"codec": "int8"})
    assert down[0] == 0 and 0 < max(down[1:]) < WHOLE / 3
    plain, _ = played()
    assert np.abs(coded.adapter - plain.adapter).max() < 0.02 * np.abs(plain.adapter).max()
    assert not np.array_equal(coded.adapter, plain.adapter)


def test_steps_cost_their_own_length() -> None:
    assert played(method=MEZO)[1] == [0, 2 * (12 + 2 * (8 + 4 * 4)), 2 * (12 + 2 * (8 + 4 * 4))]


def test_an_update_that_a_coordinator_would_refuse_ends_the_simulation() -> None:
    with pytest.raises(PayloadError) as refused:
        played(method=LORA | {"learning_rate": 100.0})
    assert refused.value.reason is Reason.OUT_OF_RANGE


@pytest.mark.parametrize("changes", [{}, {"downlink": {"codec": "int8"}}, {"method": MEZO}])
def test_a_process_that_follows_the_releases_of_another_sends_what_that_one_would(changes: dict[str, Any]) -> None:
    (first, _), (second, _) = played(**changes), played(**changes)
    text = first.engine.tokenize([Example("bcd " * 30)] * 4, 32)
    second.follow(first.publish([first.sent("a", text), second.sent("b", text)]))
    assert second.release.digest == first.release.digest
    assert second.sent("c", text).payload == first.sent("c", text).payload
