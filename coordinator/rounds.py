"""The round machine, pure: `step(round, event, now_us)` gives the next Round or raises Refused.

    open ──Accept×goal, or deadline with ≥ minimum──▶ sealed ──Publish──▶ published
      │└─── deadline with < minimum ──▶ abandoned (the same round is tried again as attempt + 1 from the same release)
      └──── Stop ──▶ abandoned (and nothing follows)

No I/O, no clock, no chance: the store's clock comes in as `now_us`. A Round is frozen, so a refused event leaves the
state as it was. Three rules shape it. The deadline runs from the first offer, so that a run may be created long before
its devices come, and it stands still while the run is paused. An evaluation round (kind "evaluate", the last of every
run) combines nothing: it is published as soon as it would seal, and its deadline never abandons it.

A *buffer* is the same machine for runs that do not wait (FedBuff, arXiv 2106.06639): a round with `max_staleness`. It
takes any update whose release is at most so many releases older than its base; the next buffer opens as this one seals,
before it is published; what an abandoned attempt holds, the next one goes on with.
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
    paused_us: int | None = None
    max_staleness: int | None = None
    """Not None for a buffer. Its `base_version` is the release it will be applied to, published or not yet."""


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
    """A checked contribution of a device that was offered a part, and how many releases old its start is."""

    staleness: int = 0


@dataclasses.dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclasses.dataclass(frozen=True)
class Publish:
    """The sealed contributions have been combined."""


@dataclasses.dataclass(frozen=True)
class Pause:
    """A person wants no more tasks handed out for now."""


@dataclasses.dataclass(frozen=True)
class Resume:
    """And now again."""


@dataclasses.dataclass(frozen=True)
class Stop:
    """A person wants the run to end. What is sealed is still published: its devices have receipts."""


@dataclasses.dataclass(frozen=True)
class Fail:
    """The sealed contributions cannot be combined, by anybody."""


Event = Offer | Leave | Withdraw | Accept | Tick | Publish | Pause | Resume | Stop | Fail


def step(state: Round, event: Event, now_us: int) -> Round:
    """The round after `event` at `now_us`. Raises Refused(ROUND_CLOSED, STALE_RELEASE) where the event has no place."""
    match event:
        case Offer():
            return _offer(state, now_us)
        case Leave():
            return dataclasses.replace(state, offered=state.offered - 1) if state.state == "open" else state
        case Withdraw():
            return _withdraw(state) if state.state == "open" else state
        case Accept():
            return _accept(state, event.staleness, now_us)
        case Tick():
            return _expire(state) if _overdue(state, now_us) else state
        case Publish():
            return dataclasses.replace(_in(state, "sealed"), state="published")
        case Fail():
            return dataclasses.replace(_in(state, "sealed"), state="abandoned")
        case _:
            return _controlled(state, event, now_us) if state.state == "open" else state


def can_offer(state: Round, now_us: int, version: int | None = None) -> bool:
    """Whether one more device may be asked, to start from release `version` (None: from the round's base)."""
    full = state.state != "open" or state.offered >= state.offers
    return not (full or state.paused_us is not None or _overdue(state, now_us) or _stale(state, version))


def staleness(state: Round, version: int) -> int:
    """How many releases lie between `version` and the one that the round will be applied to."""
    return state.base_version - version


def first(run: RunSpec) -> Round:
    """The first attempt of the first round of a run."""
    return _opened(run.cohort, number=1, base_version=0)


def retry(run: RunSpec, abandoned: Round) -> Round | None:
    """The next attempt at an abandoned round, or None when the run has tried often enough."""
    if abandoned.attempt >= run.cohort.max_attempts:
        return None
    fresh = _opened(run.cohort, abandoned.number, abandoned.base_version)
    kept = abandoned.accepted if abandoned.max_staleness is not None else 0
    return dataclasses.replace(fresh, attempt=abandoned.attempt + 1, offered=kept, accepted=kept)


def next_buffer(run: RunSpec, closed: Round) -> Round | None:
    """What opens as a buffer seals; None after a round, after the last buffer, and while nothing is sealed."""
    if closed.max_staleness is None or closed.state != "sealed" or closed.number >= run.rounds:
        return None
    return _opened(run.cohort, closed.number + 1, closed.base_version + 1)


def after(run: RunSpec, published: Round, now_us: int) -> Round | None:
    """What opens as a round is published: the next one, then one evaluation of the last release, then nothing (None).
    The next buffer has been open for a while."""
    if published.kind == "evaluate":
        return None
    number, version = published.number + 1, published.base_version + 1
    if published.number < run.rounds:
        return None if published.max_staleness is not None else _opened(run.cohort, number, version)
    size = published.accepted
    length_us = _length_us(run.cohort)
    return Round(number, 1, "evaluate", version, size, 0, size, length_us, deadline_us=now_us + length_us)


def _opened(cohort: Cohort, number: int, base_version: int) -> Round:
    offers, length_us = math.ceil(cohort.size * cohort.over_selection), _length_us(cohort)
    fresh = Round(number, 1, "train", base_version, cohort.size, cohort.minimum, offers, length_us)
    return dataclasses.replace(fresh, max_staleness=cohort.max_staleness)


def _length_us(cohort: Cohort) -> int:
    return int(cohort.deadline_s * 1e6)


def _offer(state: Round, now_us: int) -> Round:
    if not can_offer(state, now_us):
        raise Refused(Reason.ROUND_CLOSED, f"round {state.number} asks no more devices")
    deadline = state.deadline_us if state.deadline_us is not None else now_us + state.length_us
    return dataclasses.replace(state, offered=state.offered + 1, deadline_us=deadline)


def _accept(state: Round, staleness: int, now_us: int) -> Round:
    _in(state, "open")
    if _overdue(state, now_us) and state.max_staleness is None:
        raise Refused(Reason.ROUND_CLOSED, f"round {state.number} closed at its deadline")
    if staleness > (state.max_staleness or 0):
        raise Refused(
            Reason.STALE_RELEASE,
            f"it starts {staleness} releases back; this run takes {state.max_staleness or 0} at most",
        )
    grown = dataclasses.replace(state, accepted=state.accepted + 1)
    return _full(grown) if grown.accepted >= grown.goal else grown


def _withdraw(state: Round) -> Round:
    """Another device may take the place; in a buffer the task may be of an earlier one, which asked for it."""
    return dataclasses.replace(state, offered=max(0, state.offered - 1), accepted=state.accepted - 1)


def _controlled(state: Round, event: Event, now_us: int) -> Round:
    """An open round under a person's hand."""
    if isinstance(event, Stop):
        return dataclasses.replace(state, state="abandoned")
    if isinstance(event, Pause):
        return state if state.paused_us is not None else dataclasses.replace(state, paused_us=now_us)
    if state.paused_us is None:
        return state
    deadline = None if state.deadline_us is None else state.deadline_us + max(0, now_us - state.paused_us)
    return dataclasses.replace(state, paused_us=None, deadline_us=deadline)


def _overdue(state: Round, now_us: int) -> bool:
    """While a round is paused its clock stands still: what was overdue before stays so."""
    at_us = now_us if state.paused_us is None else state.paused_us
    return state.state == "open" and state.deadline_us is not None and at_us >= state.deadline_us


def _stale(state: Round, version: int | None) -> bool:
    return version is not None and staleness(state, version) > (state.max_staleness or 0)


def _expire(state: Round) -> Round:
    return _full(state) if state.accepted >= state.minimum else dataclasses.replace(state, state="abandoned")


def _full(state: Round) -> Round:
    return dataclasses.replace(state, state="published" if state.kind == "evaluate" else "sealed")


def _in(state: Round, wanted: State) -> Round:
    if state.state != wanted:
        raise Refused(Reason.ROUND_CLOSED, f"round {state.number} (attempt {state.attempt}) is {state.state}")
    return state
