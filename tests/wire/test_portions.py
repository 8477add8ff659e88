"""Portions: what each row gives to whom, and that a part comes back, or is refused by name."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wire import portion_rules, portions, spec
from wire.banks import banks, spread, unmarked
from wire.codecs.chain import codec
from wire.delta import Delta, Layout, Tensor, layer_number
from wire.errors import PayloadError, Reason, SpecError
from wire.portion_rules import PORTIONS, Bank, Rule
from wire.portions import Part, Portion

LAYERS, RANK = 6, 4
LAYOUT = Layout(
    tuple(
        tensor
        for n in range(LAYERS)
        for tensor in (
            Tensor(f"base_model.model.layers.{n}.q.lora_A.weight", (RANK, 10), "lora_A"),
            Tensor(f"base_model.model.layers.{n}.q.lora_B.weight", (8, RANK), "lora_B"),
            Tensor(f"base_model.model.layers.{n}.q.lora_A.history.weight", (2, 10), "history_A"),
        )
    )
)
INT8 = codec("int8")
VECTOR = np.random.default_rng(1).normal(size=LAYOUT.size).astype(np.float32) * np.float32(0.01)


def row(name: str, **fields: Any) -> Rule:
    made: Rule = spec.build(PORTIONS, {"id": name, **fields})
    return made


def part(portion: Portion) -> Part:
    return Part(LAYOUT, portion, Delta(portion.layout(LAYOUT), portion.take(VECTOR, LAYOUT)))


def encoded(update: Part) -> bytes:
    return update.encode(INT8, INT8.init(update.delta.layout))[0]


def test_a_smaller_rank_has_the_first_rows_of_a_and_the_first_columns_of_b() -> None:
    portion = Portion((0, 1), 3)
    assert [t.shape for t in portion.layout(LAYOUT).tensors] == [(3, 10), (8, 3)]
    a, b = np.split(portion.take(VECTOR, LAYOUT), [30])
    assert np.array_equal(a.reshape(3, 10), VECTOR[:40].reshape(4, 10)[:3])
    assert np.array_equal(b.reshape(8, 3), VECTOR[40:72].reshape(8, 4)[:, :3])


@given(st.sets(st.integers(0, 3 * LAYERS - 1), min_size=1), st.integers(1, 6))
def test_what_is_taken_is_put_back_where_it_was_and_zeros_elsewhere(places: set[int], rank: int) -> None:
    portion = Portion(tuple(sorted(places)), rank)
    back = portion.put(portion.take(VECTOR, LAYOUT), LAYOUT)
    assert np.array_equal(back[back != 0], VECTOR[back != 0])
    assert np.count_nonzero(back) == portion.layout(LAYOUT).size


@pytest.mark.parametrize("name", sorted(PORTIONS))
def test_every_row_gives_tensors_that_devices_tune_and_takes_back_what_it_gave(name: str) -> None:
    rule = row(name)
    layout = spread(LAYOUT, rule.names) if isinstance(rule, Bank) else LAYOUT
    assert spec.build(PORTIONS, spec.plain(rule)) == rule
    for number in range(1, 8):
        most = rule.most(layout, number, "d-1")
        assert all(layout.tensors[n].role != "history_A" for n in most.chosen)
        assert rule.most(layout, number, "d-1") == most
        given = most if rule.choose is None else Portion(most.chosen[: 2 * rule.choose])
        given = Portion(rule.within(banks(layout)["second"], layout)) if isinstance(rule, Bank) else given
        portion_rules.check(rule, given, layout, number, "d-1")


def test_a_and_b_come_alternately() -> None:
    roles = [{LAYOUT.tensors[n].role for n in row("alternate").most(LAYOUT, t, "d").chosen} for t in (1, 2, 3)]
    assert roles == [{"lora_B"}, {"lora_A"}, {"lora_B"}]


@pytest.mark.parametrize("name", ["fragments", "segments"])
def test_in_as_many_rounds_as_there_are_fragments_every_tensor_comes_once(name: str) -> None:
    rule = row(name, count=3)
    sent = [n for t in range(1, 4) for n in rule.most(LAYOUT, t, "d").chosen]
    assert sorted(sent) == list(portion_rules.tunable(LAYOUT))


def test_segments_of_a_round_differ_by_device_and_fragments_do_not() -> None:
    def different(name: str) -> int:
        return len({row(name, count=3).most(LAYOUT, 1, f"d-{n}") for n in range(20)})

    assert (different("fragments"), different("segments")) == (1, 3)


def test_random_layers_are_as_many_as_asked_for_and_others_for_another_device_and_round() -> None:
    rule = row("random_layers", layers=2)
    drawn = [rule.most(LAYOUT, t, d) for t in (1, 2, 3) for d in ("a", "b", "c")]
    assert all(len(portion.chosen) == 4 for portion in drawn) and len(set(drawn)) > 4


def test_an_adapter_grows_from_the_top_in_depth_and_rank() -> None:
    rule = row("growing", layers=2, rank=1, rounds=3)
    found = [rule.most(LAYOUT, number, "d") for number in (1, 3, 4, 7, 20)]
    assert [(len(p.chosen) // 2, p.rank) for p in found] == [(2, 1), (2, 1), (4, 2), (6, 3), (6, 7)]
    assert found[0].chosen[-1] == 3 * LAYERS - 2


@pytest.mark.parametrize("portion", [Portion((0, 1), 3), Portion((4,)), Portion(tuple(range(18)), 1)])
def test_a_part_comes_back(portion: Portion) -> None:
    sent = part(portion)
    payload = encoded(sent)
    found = portions.decode(payload, INT8, LAYOUT)
    assert found.portion == portion and len(payload) <= portions.max_bytes(INT8, LAYOUT)
    assert np.abs(found.vector - sent.vector).max() < 1e-3


def test_a_part_that_was_not_asked_for_is_refused_by_name() -> None:
    rule = row("alternate")
    for number, portion in [(1, Portion((0,))), (1, Portion((1, 4))), (2, rule.most(LAYOUT, 1, "d"))]:
        with pytest.raises(PayloadError, match="do not give in round") as caught:
            portion_rules.check(rule, portion, LAYOUT, number, "d")
        assert caught.value.reason is Reason.WRONG_LAYOUT


def test_a_device_may_have_a_smaller_rank_only_where_the_run_says_so() -> None:
    most = row("tuned").most(LAYOUT, 1, "d")
    narrow = Portion(most.chosen, 2)
    portion_rules.check(row("tuned", least_rank=2), narrow, LAYOUT, 1, "d")
    for rule in (row("tuned"), row("tuned", least_rank=3)):
        with pytest.raises(PayloadError):
            portion_rules.check(rule, narrow, LAYOUT, 1, "d")


def test_a_device_chooses_no_more_layers_than_the_run_allows() -> None:
    rule = row("chosen", layers=2)
    first, second, third = [(n, n + 1) for n in (0, 3, 6)]  # A and B; what follows is history
    portion_rules.check(rule, Portion(first), LAYOUT, 1, "d")
    portion_rules.check(rule, Portion(first + third), LAYOUT, 1, "d")
    with pytest.raises(PayloadError):
        portion_rules.check(rule, Portion(first + second + third), LAYOUT, 1, "d")


def test_a_device_sends_one_whole_bank_and_nothing_beside_it() -> None:
    rule: Any = row("bank", names=["law", "code"])
    layout = spread(LAYOUT, rule.names)
    law, code = (rule.within(places, layout) for places in banks(layout).values())
    assert len(law) == len(code) == 2 * LAYERS and not set(law) & set(code)
    for sent in (law, code):
        portion_rules.check(rule, Portion(sent), layout, 1, "d")
    for refused in (law + code, law[:-1], code[1:], banks(layout)["law"], (*law[:-1], code[-1])):
        with pytest.raises(PayloadError):
            portion_rules.check(rule, Portion(refused), layout, 1, "d")
    with pytest.raises(PayloadError):
        portion_rules.check(rule, Portion(law, 2), layout, 1, "d")


def test_banks_are_copies_of_one_layout_under_names_that_do_not_number_a_layer() -> None:
    layout = spread(LAYOUT, ("law", "7"))
    first, second = (Portion(places).layout(layout) for places in banks(layout).values())
    assert unmarked(first) == unmarked(second) == LAYOUT and first.digest != second.digest
    assert [layer_number(t.name) for t in layout.tensors] == 2 * [layer_number(t.name) for t in LAYOUT.tensors]
    assert not banks(LAYOUT)
    with pytest.raises(SpecError, match="of 2000 banks"):
        spread(LAYOUT, [f"b{n}" for n in range(2000)])


@pytest.mark.parametrize("names", [[], ["law"], ["law", "law"], ["law", "a.b"], ["law", ""]])
def test_banks_have_names_of_their_own_and_are_several(names: list[str]) -> None:
    with pytest.raises(SpecError, match="names"):
        row("bank", names=names)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_garbage_is_refused_or_is_a_part(data: st.DataObject) -> None:
    payload = bytearray(encoded(part(Portion((0, 1, 3), 2))))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    for garbage in (bytes(payload), bytes(payload[: data.draw(st.integers(0, len(payload)))])):
        with contextlib.suppress(PayloadError):
            assert portions.decode(garbage, INT8, LAYOUT).vector.shape == (LAYOUT.size,)


ONLY: dict[str, Layout] = {
    role: Layout(tuple(t for t in LAYOUT.tensors if t.role in (role, "history_A"))) for role in ("lora_A", "lora_B")
} | {
    "core": Layout((Tensor("model.layers.0.q.core", (4, 4), "core"),)),
    "gain": Layout((Tensor("norm", (3,), "gain"),)),
}


@pytest.mark.parametrize("name", sorted(PORTIONS))
@pytest.mark.parametrize("role", sorted(ONLY))
def test_a_layout_is_refused_or_gives_every_device_something_in_every_round(name: str, role: str) -> None:
    rule = row(name)
    layout = spread(ONLY[role], rule.names) if isinstance(rule, Bank) else ONLY[role]
    if name == "alternate" and role in ("lora_A", "lora_B"):
        with pytest.raises(SpecError, match=r"nothing to send in round .* Tune and share both"):
            portion_rules.check_layout(rule, layout)
        return
    portion_rules.check_layout(rule, layout)
    assert all(rule.most(layout, number, device).chosen for number in range(1, 30) for device in ("a", "b", "c"))


def test_a_layout_of_history_alone_is_refused() -> None:
    alone = Layout(tuple(t for t in LAYOUT.tensors if t.role == "history_A"))
    with pytest.raises(SpecError, match="nothing that devices tune"):
        portion_rules.check_layout(row("fragments"), alone)
