"""Banks: several adapters in one run; a device computes with the one that fits its text, and its updates move that one alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from coordinator.rules import Rules
from edge_client.banks import fitting, initial_of, layout_of, of_domain
from edge_client.data import Example
from edge_client.engines import Tokens
from edge_client.engines.toy import ToyBase, ToyEngine
from edge_client.session import settled, view_of
from edge_client.view import View
from experiments.simulation import Simulation
from wire import run_spec
from wire.banks import banks
from wire.delta import Vector
from wire.errors import SpecError, UserError
from wire.run_spec import RunSpec
from wire.scalars import Directions, Trajectory

BASE = ToyBase()
TEXTS = {"anna": "abab", "ben": "acac", "cleo": "abab", "dora": "acac"}
"""What follows an a is b for some, and c for others: no one adapter fits all."""
LORA: dict[str, Any] = {
    "id": "lora",
    "rank": 4,
    "local_steps": 6,
    "batch": 2,
    "sequence_length": 32,
    "learning_rate": 0.05,
}


def run_of(**changes: Any) -> RunSpec:
    table = {
        "name": "offices",
        "base": {"model": "toy", "format": "toy"},
        "rounds": 9,
        "cohort": {"goal": 4},
        "method": LORA,
    }
    banked = {"portions": {"id": "bank", "names": ["law", "code"]}}
    return run_spec.parse(table | {"codec": "float32"} | banked | changes)


def federation(**changes: Any) -> Simulation:
    return Simulation(run_of(**changes), BASE, ToyEngine, 1, None)


def texts(simulation: Simulation) -> dict[str, list[Tokens]]:
    return {who: simulation.engine.tokenize([Example(text * 20)] * 4, 32) for who, text in TEXTS.items()}


def losses(simulation: Simulation) -> dict[str, float]:
    found = {}
    for who, some in texts(simulation).items():
        engine = simulation.engine_of(who)
        engine.write(simulation.adapter_of(who))
        total, count = engine.loss(some)
        found[who] = total / count
    return found


def bank_of(simulation: Simulation, who: str) -> str | None:
    return simulation.view_of(who).bank_name


def test_devices_of_one_kind_of_text_come_to_share_a_bank_and_learn_what_one_adapter_cannot() -> None:
    alone, several = federation(portions=None), federation()
    for _ in range(9):
        alone.round(texts(alone))
        several.round(texts(several))
    assert bank_of(several, "anna") == bank_of(several, "cleo") != bank_of(several, "ben") == bank_of(several, "dora")
    one, many = losses(alone), losses(several)
    assert all(many[who] < one[who] - 0.2 for who in TEXTS)


@pytest.mark.parametrize("seed", range(1, 9))
def test_kinds_of_text_come_apart_where_they_did_not_begin_in_the_same_banks(seed: int) -> None:
    simulation = federation(seed=seed)
    simulation.round(texts(simulation))
    began = {who: str(bank_of(simulation, who)) for who in TEXTS}
    for _ in range(8):
        simulation.round(texts(simulation))
    now = {who: bank_of(simulation, who) for who in TEXTS}
    apart = now["anna"] == now["cleo"] != now["ben"] == now["dora"]
    assert apart or sorted([began["anna"], began["cleo"]]) == sorted([began["ben"], began["dora"]])
    assert not (apart and len(set(began.values())) == 1), "a bank that nobody begins with stays as the base"


def test_an_update_moves_its_bank_alone_and_by_the_mean_of_the_devices_that_chose_it() -> None:
    simulation = federation()
    before = simulation.adapter
    sent = {who: simulation.sent(who, some) for who, some in texts(simulation).items()}
    simulation.publish([sent["anna"]])
    places = [place for _, place in simulation.layout.slices()]
    mine = set(simulation.view_of("anna").bank or ())
    for number, place in enumerate(places):
        assert (simulation.adapter[place] != before[place]).any() == (number in mine)


def test_banks_compute_as_the_base_at_first_and_start_apart() -> None:
    run, adapter = settled(run_of(), BASE)
    start, layout = initial_of(run, adapter, BASE), layout_of(run, adapter, BASE)
    one, other = (
        np.concatenate([start[p] for n, (_, p) in enumerate(layout.slices()) if n in b]) for b in banks(layout).values()
    )
    assert not np.array_equal(one, other)
    engine = ToyEngine.load(BASE, adapter, adapter.layout(BASE))
    some = engine.tokenize([Example("abab" * 20)], 32)
    assert np.ptp(engine.losses(some, [one, other, np.zeros_like(one)])) == 0


def view_with(losses_of: dict[str, float]) -> tuple[View, Any, Trajectory]:
    """A view, an engine that finds these losses of each bank, and a release whose banks are told apart by their entries."""
    run, adapter = settled(run_of(), BASE)
    view = view_of(run, adapter, BASE, None)
    release = np.zeros(view.shared.size, np.float32)
    slices = [place for _, place in view.shared.slices()]
    for number, places in enumerate(banks(view.shared).values()):
        for place in places:
            release[slices[place]] = number
    told = list(losses_of.values())

    class Engine:
        def losses(self, batch: Any, adapters: list[Vector]) -> Any:
            assert all(adapter.shape == (view.layout.size,) for adapter in adapters)
            return np.array([told[int(adapter[0])] for adapter in adapters])

    return view, Engine(), Trajectory.start(Directions(), view.shared, release, 0)


def test_the_bank_of_the_least_loss_is_chosen_and_of_equal_ones_another_by_device() -> None:
    for found, wanted in (({"law": 2.0, "code": 1.0}, "code"), ({"law": 1.0, "code": 1.5}, "law")):
        view, engine, release = view_with(found)
        assert {fitting(view, f"d{n}", engine, release, []).bank_name for n in range(8)} == {wanted}
    view, engine, release = view_with({"law": 1.0, "code": 1.0})
    chosen = [fitting(view, f"d{n}", engine, release, []).bank_name for n in range(16)]
    assert set(chosen) == {"law", "code"}
    assert chosen == [fitting(view, f"d{n}", engine, release, []).bank_name for n in range(16)]


def test_who_takes_a_bank_home_says_which() -> None:
    run, adapter = settled(run_of(), BASE)
    view = view_of(run, adapter, BASE, None)
    assert of_domain(run, view, "code").bank_name == "code"
    with pytest.raises(UserError, match="has the banks law, code: name one as --domain"):
        of_domain(run, view, None)
    with pytest.raises(UserError, match="no 'art': it has the banks law, code"):
        of_domain(run, view, "art")
    plain, adapter = settled(run_of(portions=None), BASE)
    whole = view_of(plain, adapter, BASE, None)
    assert of_domain(plain, whole, None) is whole
    with pytest.raises(UserError, match="one adapter for all"):
        of_domain(plain, whole, "law")


def test_what_does_not_go_with_banks_is_refused() -> None:
    with pytest.raises(SpecError, match="no personal tensors"):
        settled(run_of(method=LORA | {"adapter": {"id": "lora", "rank": 4, "keeps": "pair"}}), BASE)
    with pytest.raises(SpecError, match="scalars along directions"):
        settled(run_of(method={"id": "mezo", "adapter": {"id": "lora", "rank": 4}}), BASE)
    run, adapter = settled(run_of(), BASE)
    for layout in (
        adapter.layout(BASE),
        layout_of(run_of(portions={"id": "bank", "names": ["a", "b"]}), adapter, BASE),
    ):
        with pytest.raises(SpecError, match="other banks"):
            Rules.of(run, layout)
