"""Who is asked and when the others come again: pure rules, and the lobby that applies them."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator import pacing
from coordinator.lobby import Lobby
from coordinator.stores import Ask, Offers
from wire.errors import EdgetuneError, Reason, Refused

CHANCES = [n / 10_000 for n in range(10_000)]


def test_a_crowd_comes_back_evenly_and_no_faster_than_it_can_be_served() -> None:
    returns = [pacing.retry_after_s(5.0, 10_000, chance) for chance in CHANCES]
    a_second = Counter(int(s) for s in returns)
    assert min(returns) == 5.0
    assert max(a_second.values()) <= pacing.CALLS_PER_S + 1


@pytest.mark.parametrize("replicas", [1, 2, 4, 8, 16])
def test_a_crowd_of_many_replicas_comes_back_no_faster_than_each_of_them_and_their_store_can_serve(
    replicas: int,
) -> None:
    share = 12_000 // replicas
    returns = [pacing.retry_after_s(None, share, n / share, replicas) for n in range(share)]
    to_each = max(Counter(int(s) for s in returns).values())
    assert to_each <= pacing.CALLS_PER_S + 1
    assert replicas * (to_each - 1) <= pacing.STORE_CALLS_PER_S
    assert replicas * to_each >= min(replicas * pacing.CALLS_PER_S, pacing.STORE_CALLS_PER_S) - replicas


def test_a_lobby_reckons_with_the_replicas_that_share_its_store() -> None:
    def last(replicas: int) -> float:
        lobby = Lobby(Asked(None), replicas)  # type: ignore[arg-type]  # no ledger is asked
        return min([lobby.send_away(None) for _ in range(2_000)][-100:])

    async def scene() -> None:
        assert last(16) > 3 * last(1)

    asyncio.run(scene())


def test_a_crowd_that_nobody_can_serve_in_time_still_spreads_over_all_the_time_there_is() -> None:
    returns = [pacing.retry_after_s(None, 10**6, chance) for chance in CHANCES]
    assert len({round(s, 2) for s in returns}) > 9_000


@given(st.none() | st.floats(0, 1e9), st.integers(0, 10**9), st.floats(0, 0.999))
def test_nobody_is_sent_away_for_longer_than_two_spreads(work_in_s: float | None, waiting: int, chance: float) -> None:
    assert 0 <= pacing.retry_after_s(work_in_s, waiting, chance) <= 2 * pacing.LONGEST_S


@given(st.none() | st.floats(0, 1e9), st.integers(0, pacing.HELD))
def test_a_small_fleet_is_told_of_work_at_once(work_in_s: float | None, waiting: int) -> None:
    assert pacing.retry_after_s(work_in_s, waiting, 0.999) < pacing.LEAST_S


def test_over_many_rounds_every_device_is_taken_about_as_often_as_any_other() -> None:
    devices, taken = [f"d{n}" for n in range(20)], Counter[str]()
    for number in range(1, 1001):
        taken.update(sorted(devices, key=lambda d: pacing.lot(7, "run", number, 1, d))[:5])
    assert len(taken) == 20 and all(190 < count < 310 for count in taken.values())


def test_the_lot_is_another_for_each_seed_run_round_and_attempt() -> None:
    assert len({pacing.lot(*key, "d") for key in [(1, "r", 1, 1), (2, "r", 1, 1), (1, "s", 1, 1), (1, "r", 2, 1)]}) == 4
    assert pacing.lot(1, "r", 1, 1, "d") != pacing.lot(1, "r", 1, 2, "d")


class Asked:
    """A ledger's `offer_together`, that notes who was asked for together."""

    def __init__(self, outcome: Any) -> None:
        self.groups: list[list[str]] = []
        self._outcome = outcome

    async def offer_together(self, asks: Sequence[Ask]) -> list[Offers | EdgetuneError]:
        self.groups.append([ask.device for ask in asks])
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return [self._outcome] * len(asks)


def test_devices_that_ask_together_are_asked_for_together() -> None:
    async def scene() -> None:
        ledger = Asked(Offers(None, 1, (), 9.0))
        lobby = Lobby(ledger)  # type: ignore[arg-type]  # all of a ledger that a lobby uses
        answers = await asyncio.gather(*[lobby.ask(Ask(f"d{n}", ())) for n in range(50)])
        assert [len(group) for group in ledger.groups] == [50] and answers[0].active == 1
        await lobby.ask(Ask("d", ()))
        assert len(ledger.groups) == 2

    asyncio.run(scene())


def test_a_ledger_that_fails_fails_everybody_who_asked_and_the_next_are_served() -> None:
    async def scene() -> None:
        ledger = Asked(Refused(Reason.BUSY, "later"))
        lobby = Lobby(ledger)  # type: ignore[arg-type]  # all of a ledger that a lobby uses
        for _ in range(2):
            with pytest.raises(Refused):
                await lobby.ask(Ask("d", ()))
        gone = asyncio.create_task(lobby.ask(Ask("gone", ())))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(Refused):
            await lobby.ask(Ask("d", ()))
        assert len(ledger.groups) == 3

    asyncio.run(scene())


def test_the_more_devices_wait_the_longer_they_are_sent_away() -> None:
    async def scene() -> tuple[list[float], list[float]]:
        lobby = Lobby(Asked(None))  # type: ignore[arg-type]  # no ledger is asked
        first = [lobby.send_away(None) for _ in range(pacing.HELD)]
        return first, [lobby.send_away(None) for _ in range(5_000)][-100:]

    first, later = asyncio.run(scene())
    assert max(first) < pacing.LEAST_S and min(later) > 50.0
