"""The round machine is pure: every rule is checked by giving it events and a clock."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import rounds
from coordinator.rounds import Accept, Leave, Offer, Pause, Publish, Resume, Round, Stop, Tick, Withdraw, step
from wire import run_spec
from wire.errors import Reason, Refused

SECOND = 1_000_000


def spec(**cohort: Any) -> run_spec.RunSpec:
    table = {
        "name": "r",
        "base": {"model": "toy", "format": "toy", "digest": "0" * 64},
        "rounds": 2,
        "cohort": {"goal": 2, "deadline_s": 10.0, **cohort},
        "method": {"id": "lora"},
        "codec": "float32",
    }
    return run_spec.parse(table)


def opened(**cohort: Any) -> Round:
    return rounds.first(spec(**cohort))


def play(state: Round, *events: rounds.Event, now_us: int = 0) -> Round:
    for event in events:
        state = step(state, event, now_us)
    return state


def test_a_round_seals_when_its_goal_is_reached() -> None:
    state = play(opened(), Offer(), Offer(), Accept())
    assert state.state == "open"
    assert step(state, Accept(), 1).state == "sealed"


def test_no_device_is_asked_beyond_the_over_selection() -> None:
    state = play(opened(goal=3, over_selection=1.3), *[Offer()] * 4)
    assert not rounds.can_offer(state, 0)
    with pytest.raises(Refused) as refusal:
        step(state, Offer(), 0)
    assert refusal.value.reason is Reason.ROUND_CLOSED


def test_a_device_that_leaves_makes_room_for_another() -> None:
    state = play(opened(goal=1), Offer(), Leave())
    assert rounds.can_offer(state, 0)


def test_an_update_that_is_withdrawn_makes_room_for_another_but_only_while_the_round_is_open() -> None:
    state = play(opened(), Offer(), Offer(), Accept())
    again = step(state, Withdraw(), 0)
    assert (again.offered, again.accepted) == (1, 0) and rounds.can_offer(again, 0)
    sealed = step(state, Accept(), 0)
    assert step(sealed, Withdraw(), 0) == sealed


def test_the_deadline_runs_from_the_first_offer_and_not_from_the_creation_of_the_run() -> None:
    fresh = opened()
    assert step(fresh, Tick(), 10**15) == fresh
    offered = step(fresh, Offer(), 100 * SECOND)
    assert offered.deadline_us == 110 * SECOND
    assert step(offered, Offer(), 105 * SECOND).deadline_us == 110 * SECOND


def test_at_the_deadline_a_round_with_its_minimum_seals() -> None:
    state = play(opened(goal=2, minimum=1), Offer(), Offer(), Accept())
    assert step(state, Tick(), 10 * SECOND - 1).state == "open"
    assert step(state, Tick(), 10 * SECOND).state == "sealed"


def test_at_the_deadline_a_round_below_its_minimum_is_abandoned_and_tried_again_from_the_same_release() -> None:
    state = step(play(opened(goal=2, minimum=2), Offer(), Accept()), Tick(), 10 * SECOND)
    assert state.state == "abandoned"
    again = rounds.retry(spec(goal=2, minimum=2), state)
    assert again is not None
    assert (again.number, again.attempt, again.base_version, again.accepted) == (1, 2, 0, 0)


def test_a_run_that_misses_its_minimum_too_often_has_no_next_attempt() -> None:
    abandoned = dataclasses.replace(opened(), state="abandoned", attempt=3)
    assert rounds.retry(spec(max_attempts=3), abandoned) is None


@pytest.mark.parametrize("state", ["sealed", "published", "abandoned"])
def test_a_closed_round_refuses_updates_by_name(state: Any) -> None:
    closed = dataclasses.replace(opened(), state=state)
    with pytest.raises(Refused) as refusal:
        step(closed, Accept(), 0)
    assert refusal.value.reason is Reason.ROUND_CLOSED


def test_an_update_after_the_deadline_is_refused_even_before_the_tick() -> None:
    state = play(opened(), Offer(), Offer())
    with pytest.raises(Refused):
        step(state, Accept(), 10 * SECOND)


def test_only_a_sealed_round_is_published() -> None:
    with pytest.raises(Refused):
        step(opened(), Publish(), 0)


def test_the_last_training_round_is_followed_by_one_evaluation_of_its_release_and_then_nothing() -> None:
    run = spec()
    published = dataclasses.replace(opened(), number=2, base_version=1, state="published", accepted=2)
    last = rounds.after(run, published, 7)
    assert last is not None
    assert (last.kind, last.number, last.base_version, last.goal, last.minimum) == ("evaluate", 3, 2, 2, 0)
    done = play(last, Offer(), Offer(), Accept(), Accept())
    assert done.state == "published"
    assert rounds.after(run, done, 0) is None


def test_an_evaluation_that_nobody_answers_ends_at_its_deadline() -> None:
    published = dataclasses.replace(opened(), number=2, base_version=1, state="published", accepted=2)
    last = rounds.after(spec(), published, 0)
    assert last is not None
    assert step(last, Tick(), 10 * SECOND).state == "published"


def test_a_paused_round_asks_nobody_takes_what_is_under_way_and_does_not_age() -> None:
    state = step(play(opened(), Offer()), Pause(), 4 * SECOND)
    assert not rounds.can_offer(state, 4 * SECOND)
    with pytest.raises(Refused):
        step(state, Offer(), 4 * SECOND)
    assert step(state, Tick(), 99 * SECOND) == state
    taken = step(state, Accept(), 99 * SECOND)
    assert (taken.accepted, step(taken, Resume(), 100 * SECOND).deadline_us) == (1, 106 * SECOND)


def test_a_pause_saves_no_round_that_was_overdue_before() -> None:
    state = step(play(opened(), Offer()), Pause(), 11 * SECOND)
    with pytest.raises(Refused):
        step(state, Accept(), 12 * SECOND)
    assert step(state, Tick(), 12 * SECOND).state == "abandoned"


def test_a_pause_before_the_first_offer_leaves_the_deadline_to_that_offer() -> None:
    state = step(step(opened(), Pause(), 1), Resume(), 50 * SECOND)
    assert step(state, Offer(), 60 * SECOND).deadline_us == 70 * SECOND


@pytest.mark.parametrize("event", [Pause(), Resume(), Stop()])
@pytest.mark.parametrize("state", ["sealed", "published", "abandoned"])
def test_what_is_closed_stays_as_it_is_whatever_a_person_wants(state: Any, event: rounds.Event) -> None:
    closed = dataclasses.replace(opened(), state=state)
    assert step(closed, event, 5) == closed


def buffered(**cohort: Any) -> run_spec.RunSpec:
    return spec(**{"goal": 0, "mode": "async", "buffer": 2, "max_staleness": 2} | cohort)


def test_a_buffer_takes_what_is_not_too_old_and_refuses_the_rest_by_name() -> None:
    state = dataclasses.replace(play(rounds.first(buffered()), Offer(), Offer()), base_version=5)
    assert [rounds.staleness(state, version) for version in (5, 3, 2)] == [0, 2, 3]
    assert step(state, Accept(2), 0).accepted == 1
    with pytest.raises(Refused) as refusal:
        step(state, Accept(3), 0)
    assert refusal.value.reason is Reason.STALE_RELEASE
    assert rounds.can_offer(rounds.first(buffered()), 0, 0)
    assert not rounds.can_offer(dataclasses.replace(state, offered=0), 0, 2)


def test_a_round_takes_nothing_that_starts_elsewhere() -> None:
    with pytest.raises(Refused) as refusal:
        step(play(opened(), Offer()), Accept(1), 0)
    assert refusal.value.reason is Reason.STALE_RELEASE


def test_the_next_buffer_opens_at_the_seal_and_after_the_last_comes_the_evaluation() -> None:
    run = buffered()
    first = rounds.first(run)
    assert rounds.next_buffer(run, first) is None
    second = rounds.next_buffer(run, dataclasses.replace(first, state="sealed"))
    assert second is not None and (second.number, second.base_version, second.max_staleness) == (2, 1, 2)
    assert rounds.next_buffer(run, dataclasses.replace(second, state="sealed")) is None
    assert rounds.after(run, dataclasses.replace(first, state="published"), 0) is None
    last = rounds.after(run, dataclasses.replace(second, state="published", accepted=2), 0)
    assert last is not None and (last.kind, last.max_staleness) == ("evaluate", None)
    assert rounds.next_buffer(spec(), dataclasses.replace(opened(), state="sealed")) is None


EVENTS = st.lists(
    st.tuples(
        st.sampled_from([Offer(), Leave(), Accept(), Accept(1), Tick(), Publish(), Pause(), Resume(), Stop()]),
        st.integers(0, 4),
    )
)


@given(EVENTS, st.integers(1, 4), st.integers(1, 4), st.floats(1.0, 2.0), st.booleans())
def test_whatever_happens_counts_stay_sane_and_a_refused_event_changes_nothing(
    events: list[tuple[rounds.Event, int]], size: int, minimum: int, over: float, in_buffers: bool
) -> None:
    cohort = {"minimum": min(size, minimum), "over_selection": over}
    state, now = rounds.first(buffered(buffer=size, **cohort)) if in_buffers else opened(goal=size, **cohort), 0
    ends, untouched = {"published", "abandoned"}, state
    for event, seconds in events:
        now += seconds * SECOND
        if isinstance(event, Leave | Accept) and state.offered <= state.accepted:
            continue  # the ledger never lets a device without a task through
        try:
            state = step(state, event, now)
        except Refused:
            continue
        assert 0 <= state.accepted <= state.offered <= state.offers
        assert state.state != "sealed" or state.accepted >= state.minimum
        assert untouched.state not in ends or state == untouched, "an end is an end"
        untouched = state


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(0, 20))
def test_a_round_ages_only_while_it_is_not_paused(pauses: list[int], first_s: int) -> None:
    state, now, running = play(opened(deadline_s=1000.0), Offer()), 0, True
    aged = 0
    for seconds in [first_s, *pauses]:
        now += seconds * SECOND
        aged += seconds if running else 0
        state, running = step(state, Pause() if running else Resume(), now), not running
    state = step(state, Resume(), now)
    assert state.deadline_us == now + (1000 - aged) * SECOND
