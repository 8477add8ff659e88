"""The sync round machine, pure: `step(round, event, now_us)` gives the next Round or raises Refused.

    open ──Accept×goal, or deadline with ≥ minimum──▶ sealed ──Publish──▶ published
      └──── deadline with < minimum ──▶ abandoned (the same round is tried again as attempt + 1 from the same release)

No I/O, no clock, no chance: the store's clock comes in as `now_us`. A Round is frozen, so a refused event leaves the
state as it was. Two rules shape it. The deadline runs from the first offer, so that a run may be created long before
its devices come. And an evaluation round (kind "evaluate", the last of every run) combines nothing: it is published
as soon as it would seal, and its deadline never abandons it.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from wire.errors import Reason, Refused
from wire.messages import Kind
from wire.run_spec import Cohort, RunSpec

State = Literal["open", "sealed", "published", "abandoned"]


@dataclasses.dataclass(frozen=True)
class Round:
    """One attempt at one generation of a run. `offers` caps how many devices are asked; times are store-clock µs."""

    number: int
    attempt: int
    kind: Kind
    base_version: int
    goal: int
    minimum: int
    offers: int
    length_us: int
    state: State = "open"
    deadline_us: int | None = None
    offered: int = 0
    accepted: int = 0


@dataclasses.dataclass(frozen=True)
class Offer:
    """A device asks for a part in the round."""


@dataclasses.dataclass(frozen=True)
class Leave:
    """A device gives its part back unfinished."""


@dataclasses.dataclass(frozen=True)
class Withdraw:
    """A contribution that was accepted is taken out: its device was revoked."""


@dataclasses.dataclass(frozen=True)
class Accept:
    """A checked contribution of a device that was offered a part."""


@dataclasses.dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclasses.dataclass(frozen=True)
class Publish:
    """The sealed contributions have been combined."""


Event = Offer | Leave | Withdraw | Accept | Tick | Publish


def step(state: Round, event: Event, now_us: int) -> Round:
    """The round after `event` at `now_us`. Raises Refused(ROUND_CLOSED) where the event has no place."""
    match event:
        case Offer():
            return _offer(state, now_us)
        case Leave():
            return dataclasses.replace(state, offered=state.offered - 1) if state.state == "open" else state
        case Withdraw():
            return _withdraw(state) if state.state == "open" else state
        case Accept():
            return _accept(state, now_us)
        case Tick():
            return _expire(state) if _overdue(state, now_us) else state
        case Publish():
            return dataclasses.replace(_in(state, "sealed"), state="published")


def can_offer(state: Round, now_us: int) -> bool:
    """Whether one more device may be asked."""
    return state.state == "open" and state.offered < state.offers and not _overdue(state, now_us)


def first(run: RunSpec) -> Round:
    """The first attempt of the first round of a run."""
    return _opened(run.cohort, number=1, base_version=0)


def retry(run: RunSpec, abandoned: Round) -> Round | None:
    """The next attempt at an abandoned round, or None when the run has tried often enough."""
    if abandoned.attempt >= run.cohort.max_attempts:
        return None
    fresh = _opened(run.cohort, abandoned.number, abandoned.base_version)
    return dataclasses.replace(fresh, attempt=abandoned.attempt + 1)


def after(run: RunSpec, published: Round, now_us: int) -> Round | None:
    """What follows a published round: the next one, then one evaluation of the last release, then nothing (None)."""
    if published.kind == "evaluate":
        return None
    number, version = published.number + 1, published.base_version + 1
    if published.number < run.rounds:
        return _opened(run.cohort, number, version)
    size = published.accepted
    length_us = _length_us(run.cohort)
    return Round(number, 1, "evaluate", version, size, 0, size, length_us, deadline_us=now_us + length_us)


def _opened(cohort: Cohort, number: int, base_version: int) -> Round:
    offers = math.ceil(cohort.goal * cohort.over_selection)
    return Round(number, 1, "train", base_version, cohort.goal, cohort.minimum, offers, _length_us(cohort))


def _length_us(cohort: Cohort) -> int:
    return int(cohort.deadline_s * 1e6)


def _offer(state: Round, now_us: int) -> Round:
    if not can_offer(state, now_us):
        raise Refused(Reason.ROUND_CLOSED, f"round {state.number} asks no more devices")
    deadline = state.deadline_us if state.deadline_us is not None else now_us + state.length_us
    return dataclasses.replace(state, offered=state.offered + 1, deadline_us=deadline)


def _accept(state: Round, now_us: int) -> Round:
    _in(state, "open")
    if _overdue(state, now_us):
        raise Refused(Reason.ROUND_CLOSED, f"round {state.number} closed at its deadline")
    grown = dataclasses.replace(state, accepted=state.accepted + 1)
    return _full(grown) if grown.accepted >= grown.goal else grown


def _withdraw(state: Round) -> Round:
    return dataclasses.replace(state, offered=state.offered - 1, accepted=state.accepted - 1)


def _overdue(state: Round, now_us: int) -> bool:
    return state.state == "open" and state.deadline_us is not None and now_us >= state.deadline_us


def _expire(state: Round) -> Round:
    return _full(state) if state.accepted >= state.minimum else dataclasses.replace(state, state="abandoned")


def _full(state: Round) -> Round:
    return dataclasses.replace(state, state="published" if state.kind == "evaluate" else "sealed")


def _in(state: Round, wanted: State) -> Round:
    if state.state != wanted:
        raise Refused(Reason.ROUND_CLOSED, f"round {state.number} (attempt {state.attempt}) is {state.state}")
    return state
