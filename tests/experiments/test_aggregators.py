"""Federations by every row of AGGREGATORS, of devices whose ranks differ: on the toy base."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from coordinator.aggregators import AGGREGATORS
from coordinator.aggregators.products import pairs
from experiments.simulation import Simulation
from tests.experiments.test_portions import DEVICES, federation, loss, texts
from wire.errors import SpecError

RANKED = {"portions": {"id": "tuned", "least_rank": 1}, "ranks": {"a": 1, "b": 2}}
EXACT: dict[str, dict[str, Any]] = {
    "rolora": {"portions": {"id": "alternate"}},
    "ffa": {"adapter": {"tuned": "B"}},
    "flora": {"aggregator": {"id": "flora"}, "adapter": {"history": 64}},
    "fedex": {"aggregator": {"id": "fedex"}, "adapter": {"history": 64}},
    "flora of ranks": {"aggregator": {"id": "flora"}, "adapter": {"history": 64}, **RANKED},
}


def errors(simulation: Simulation, rounds: int = 4) -> list[float]:
    """The aggregation error of each round."""
    found = []
    for _ in range(rounds):
        sent = [simulation.sent(device, text) for device, text in texts(simulation).items()]
        error = simulation.aggregation_error(sent)
        assert error is not None
        found.append(error)
        simulation.publish(sent)
    return found


@pytest.mark.parametrize("changes", [{}, {"downlink": {"codec": "int8"}}, RANKED], ids=["alike", "downlink", "ranks"])
@pytest.mark.parametrize("row", sorted(AGGREGATORS))
def test_a_federation_learns_by_every_row(row: str, changes: dict[str, Any]) -> None:
    if row == "fedex" and changes is RANKED:
        with pytest.raises(SpecError, match="devices of one rank"):
            federation(aggregator={"id": row}, adapter={"history": 16}, **changes)
        return
    simulation = federation(aggregator={"id": row}, adapter={"history": 16}, **{"portions": {"id": "tuned"}} | changes)
    before = loss(simulation)
    for _ in range(6):
        simulation.round(texts(simulation))
    assert loss(simulation) < before - 0.3


@pytest.mark.parametrize("name", sorted(EXACT))
def test_the_aggregation_error_of_an_exact_method_is_rounding_in_every_round(name: str) -> None:
    assert max(errors(federation(**EXACT[name]))) < 1e-5


@pytest.mark.parametrize("changes", [{}, RANKED], ids=["alike", "ranks"])
def test_the_mean_of_factors_has_an_error_and_those_that_multiply_them_have_less(changes: dict[str, Any]) -> None:
    rows = ("mean", "flexlora", "lora_fair")
    found = {row: float(np.mean(errors(federation(aggregator={"id": row}, **changes)))) for row in rows}
    assert found["mean"] > 1e-3
    assert found["flexlora"] < found["mean"] and found["lora_fair"] < found["mean"], found


def test_flora_leaves_a_and_b_as_they_started_and_learns_into_the_history() -> None:
    simulation = federation(**EXACT["flora"])
    start = simulation.adapter
    for _ in range(3):
        simulation.round(texts(simulation))
    [pair] = pairs(simulation.layout)
    assert pair.a.of(simulation.adapter).tobytes() == pair.a.of(start).tobytes()
    assert not pair.b.of(simulation.adapter).any()
    assert pair.history is not None and pair.history.b.of(simulation.adapter).any()
    assert len(DEVICES) * 4 * 3 <= 64, "what the history holds exactly"
