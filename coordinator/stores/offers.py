"""The transactions that hand out tasks and take them back.

As in `runs.py`, the caller opens and commits; raising undoes everything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from coordinator import pacing, rounds
from coordinator.rounds import Round
from coordinator.stores import Ask, Offers, devices, rows
from coordinator.stores.connection import Connection
from wire import run_spec
from wire.errors import EdgetuneError, Reason, Refused
from wire.messages import ENDED, Task


def offer(db: Connection, ask: Ask, now_us: int) -> Offers:
    devices.check_standing(db, ask.device)
    found = db.execute(
        f"SELECT name, {rows.STATE}, edition FROM runs ORDER BY created_us, name"
    ).fetchall()  # constants
    states, editions = {row[0]: row[1] for row in found}, {row[0]: row[2] for row in found}
    if missing := [name for name in ask.runs if name not in states]:
        raise Refused(Reason.UNKNOWN_RUN, f"no run named {missing[0]!r}; `edgetune run list` shows them")
    asked = ask.runs or tuple(states)
    active = [name for name in asked if states[name] not in ENDED]
    ended = tuple(name for name in asked if states[name] in ENDED)
    _check_age(ask, {name: editions[name] for name in active})
    for name in active:
        readable = editions[name] <= min(ask.edition, run_spec.EDITION)
        if readable and (task := _offer_in(db, ask.device, name, now_us)):
            return Offers(task, len(active), ended)
    return Offers(None, len(active), ended, _next_work_s(db, active, now_us))


def _check_age(ask: Ask, editions: Mapping[str, int]) -> None:
    """Whoever can read one of the runs may wait for that one; who can read none must hear of it."""
    if editions and ask.edition < min(editions.values()):
        name, needed = min(editions.items(), key=lambda item: item[1])
        raise Refused(
            Reason.TOO_OLD,
            f"run {name!r} needs a program that reads edition {needed} of run specs, and this device's reads"
            f" {ask.edition}: install a newer edgetune there (pip install --upgrade edgetune)",
        )


def offer_together(db: Connection, asks: Sequence[Ask], now_us: int) -> list[Offers | EdgetuneError]:
    answers: list[Offers | EdgetuneError | None] = [None] * len(asks)
    for at in _by_lot(db, asks):
        try:
            answers[at] = offer(db, asks[at], now_us)
        except Refused as error:  # raised before anything was written
            answers[at] = error
    return [answer for answer in answers if answer is not None]


def _by_lot(db: Connection, asks: Sequence[Ask]) -> list[int]:
    """Whom to ask first, by the first run it wants that takes updates."""
    if len(asks) < 2:
        return list(range(len(asks)))
    found = db.execute(
        "SELECT runs.name, runs.spec, rounds.number, rounds.attempt FROM runs JOIN rounds ON rounds.run = runs.name"
        " WHERE rounds.state = 'open' ORDER BY runs.created_us, runs.name"
    ).fetchall()
    live = {name: (json.loads(text)["seed"], name, number, attempt) for name, text, number, attempt in found}

    def lot(at: int) -> bytes:
        wanted = next((name for name in asks[at].runs or live if name in live), None)
        return b"" if wanted is None else pacing.lot(*live[wanted], asks[at].device)

    return sorted(range(len(asks)), key=lot)


def _offer_in(db: Connection, device: str, name: str, now_us: int) -> Task | None:
    live = rows.open_round(db, name)
    if live is None or live.paused_us is not None or rows.has_given(db, name, live, device):
        return None
    if held := _task_under_way(db, name, live, device):
        return _task(db, name, live, *held, now_us)
    version = rows.newest_version(db, name)
    if not rounds.can_offer(live, now_us, version) or _owner_is_full(db, name, live, device):
        return None
    live = rounds.step(live, rounds.Offer(), now_us)
    rows.update_round(db, name, live)
    db.execute(
        "INSERT INTO assignments (run, number, attempt, device, state, version) VALUES (?, ?, ?, ?, 'offered', ?)"
        " ON CONFLICT (run, number, attempt, device) DO UPDATE SET state = 'offered', version = excluded.version",
        (name, live.number, live.attempt, device, version),
    )
    return _task(db, name, live, live.number, live.attempt, version, now_us)


def _owner_is_full(db: Connection, name: str, live: Round, device: str) -> bool:
    seats = rows.read_run(db, name).spec.cohort.owner_seats
    return seats is not None and devices.seats_of_others(db, name, live, device) >= seats


def _task_under_way(db: Connection, name: str, live: Round, device: str) -> tuple[int, int, int] | None:
    """(round, attempt, release version) of the task that a device has and whose update the open round would take."""
    query = "SELECT number, attempt, version FROM assignments WHERE run = ? AND device = ? AND state = 'offered'"
    if live.max_staleness is None:
        row = db.execute(
            query + " AND number = ? AND attempt = ?", (name, device, live.number, live.attempt)
        ).fetchone()
        return None if row is None else (row[0], row[1], live.base_version)
    newest = db.execute(query + " ORDER BY number DESC, attempt DESC LIMIT 1", (name, device)).fetchone()
    fresh = newest is not None and rounds.staleness(live, newest[2]) <= live.max_staleness
    return (newest[0], newest[1], newest[2]) if fresh else None


def _task(db: Connection, name: str, live: Round, number: int, attempt: int, version: int, now_us: int) -> Task:
    digests = db.execute("SELECT spec_digest, layout_digest FROM runs WHERE name = ?", (name,)).fetchone()
    release = db.execute("SELECT digest FROM releases WHERE run = ? AND version = ?", (name, version)).fetchone()
    left_s = _left_s(live, now_us)
    spec_digest, layout_digest = digests
    return Task(name, number, attempt, live.kind, version, release[0], spec_digest, layout_digest, left_s)


def _left_s(live: Round, now_us: int) -> float:
    return max(0.0, ((live.deadline_us or now_us) - now_us) / 1e6)


def _next_work_s(db: Connection, active: list[str], now_us: int) -> float | None:
    """Seconds until one of these runs has work at the latest; None where nobody knows, as of paused ones."""
    live = [rows.open_round(db, name) for name in active]
    known = [0.0 if one is None else _left_s(one, now_us) for one in live if one is None or one.paused_us is None]
    return min(known, default=None)


def leave(db: Connection, device: str, name: str, number: int, attempt: int, now_us: int) -> None:
    key = (name, number, attempt, device)
    changed = db.execute(
        "UPDATE assignments SET state = 'left'"
        " WHERE run = ? AND number = ? AND attempt = ? AND device = ? AND state = 'offered'",
        key,
    ).rowcount
    if changed:
        rows.update_round(db, name, rounds.step(rows.read_round(db, name, number, attempt), rounds.Leave(), now_us))
