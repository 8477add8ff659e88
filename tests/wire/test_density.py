"""Densities that follow the loss: the formula by hand, the entries against a sort, and a federation whose updates get shorter."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edge_client.data import Example
from edge_client.view import REST, send_part
from tests.experiments.test_portions import DEVICES, federation
from tests.wire.test_portions import LAYOUT, VECTOR, row
from wire import portions, spec
from wire.codecs import State
from wire.codecs.chain import codec
from wire.delta import Delta, Vector
from wire.density import Density
from wire.portion_rules import Segments

EXACT = codec("float32")
DENSITY = Density(most=0.9, least_a=0.3, least_b=0.1, speed_a=0.5, speed_b=2.0)


@pytest.mark.parametrize(("role", "least", "speed"), [("lora_A", 0.3, 0.5), ("lora_B", 0.1, 2.0), ("gain", 0.1, 2.0)])
@pytest.mark.parametrize("fallen", [0.0, 0.2, 1.0, 50.0])
def test_the_share_falls_from_the_most_to_the_least_with_the_loss(
    role: str, least: float, speed: float, fallen: float
) -> None:
    assert math.isclose(DENSITY.of(role, fallen), least + (0.9 - least) * math.e ** (-speed * fallen))


def test_a_loss_that_has_risen_asks_for_no_more_than_the_most() -> None:
    assert DENSITY.of("lora_A", -3.0) == DENSITY.of("lora_A", 0.0) == pytest.approx(0.9)


def test_of_each_role_the_largest_entries_stay_and_all_others_are_zero() -> None:
    vector = np.random.default_rng(5).permutation(np.arange(1, LAYOUT.size + 1)).astype(np.float32)
    vector *= np.where(np.arange(LAYOUT.size) % 2, -1, 1).astype(np.float32)
    found = DENSITY.thinned(vector, LAYOUT, 0.4)
    for role in ("lora_A", "lora_B", "history_A"):
        places = [n for t, p in LAYOUT.slices() if t.role == role for n in range(p.start, p.stop)]
        ranked = sorted(places, key=lambda n: -abs(vector[n]))
        keep = set(ranked[: math.ceil(DENSITY.of(role, 0.4) * len(places))])
        assert {n for n in places if found[n] != 0} == keep
    assert np.array_equal(found[found != 0], vector[found != 0])


def test_what_is_left_out_of_a_segment_is_carried_and_nothing_is_lost() -> None:
    rule, arrived = row("segments", count=2, density=spec.plain(DENSITY)), np.zeros(LAYOUT.size)
    kept: State = {}
    for number in (1, 2, 3):
        portion = rule.most(LAYOUT, number, "d")
        payload, kept = send_part(Delta(LAYOUT, VECTOR), portion, rule, EXACT, kept, fallen=1.0)
        sent: Vector = portions.decode(payload, EXACT, LAYOUT).vector
        assert 0 < np.count_nonzero(sent) < 0.6 * portion.layout(LAYOUT).size
        arrived += sent
    assert np.allclose(arrived + kept[REST], 3 * VECTOR, atol=1e-6)


@pytest.mark.parametrize("wrong", [{"most": 1.5}, {"least_a": 0.0}, {"least_b": 0.99}, {"speed_a": -1.0}])
def test_shares_that_cannot_be_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"expected least_a|must not be negative"):
        Density(**wrong)


def test_a_run_without_a_density_says_nothing_of_it() -> None:
    assert spec.plain(Segments(3)) == {"id": "segments", "count": 3}


def test_updates_get_shorter_as_the_loss_falls_and_all_devices_learn() -> None:
    density = {"least_a": 0.02, "least_b": 0.02, "speed_a": 2.0}
    simulation = federation(portions={"id": "segments", "count": 2, "density": density}, codec="int8")
    cycle = "".join(chr(33 + 7 * n % 94) for n in range(94))
    text = {d: simulation.engine.tokenize([Example(cycle[n:] + cycle)] * 4, 32) for n, d in enumerate(DEVICES)}

    def loss() -> float:
        simulation.engine.write(simulation.adapter)
        total, targets = simulation.engine.loss(text["a"])
        return float(total / targets)

    before, sizes = loss(), []
    for _ in range(8):
        sent = [simulation.sent(device, text[device]) for device in DEVICES]
        sizes.append(sum(len(one.payload) for one in sent))
        simulation.publish(sent)
    assert loss() < before - 1 and sizes[-1] < 0.5 * sizes[0], (before, loss(), sizes)
