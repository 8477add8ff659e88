"""The transactions that take updates, and take them out again.

As in `runs.py`, the caller opens and commits; raising undoes everything.
"""

from __future__ import annotations

import json

from coordinator import rounds
from coordinator.rounds import Round
from coordinator.stores import devices, offers, rows, runs
from coordinator.stores.connection import Connection
from wire import spec
from wire.errors import Reason, Refused
from wire.messages import Contribution, Receipt

Key = tuple[str, int, int, str]
"""Run, round, attempt and device: whose task it is."""


def check(db: Connection, offered: Contribution, now_us: int) -> Receipt | None:
    """The receipt if it is in already, None if it may come in; raises what `accept` would raise."""
    devices.check_standing(db, offered.device)
    spec_text = db.execute("SELECT spec FROM runs WHERE name = ?", (offered.run,)).fetchone()
    if spec_text is None:
        raise Refused(Reason.UNKNOWN_RUN, f"no run named {offered.run!r}")
    known = db.execute("SELECT digest FROM contributions" + rows.KEY, _key(offered)).fetchone()
    if known is not None:
        if known[0] != offered.digest:
            raise Refused(
                Reason.CONFLICTING_UPDATE, "this device's part in the round is already taken by another payload"
            )
        return Receipt(offered.run, offered.round, offered.attempt, offered.device, offered.digest)
    live, version = check_open(db, _key(offered), now_us)
    _check_names(db, offered, live, version, json.loads(spec_text[0])["base"]["digest"])
    return None


def _key(offered: Contribution) -> Key:
    return (offered.run, offered.round, offered.attempt, offered.device)


def check_open(db: Connection, key: Key, now_us: int) -> tuple[Round, int]:
    """As `_landing`; raises what an update for this task would be refused by, before it has come."""
    live, version = _landing(db, key)
    rounds.step(live, rounds.Accept(rounds.staleness(live, version)), now_us)
    return live, version


def _landing(db: Connection, key: Key) -> tuple[Round, int]:
    """The round in which a task's update would count, and the version of the release its device was given: the round of
    its task, or, if that was a buffer, the buffer that is open now."""
    name, number, attempt, device = key
    held = db.execute("SELECT state, version FROM assignments" + rows.KEY, key).fetchone()
    if held is None or held[0] != "offered":
        raise Refused(Reason.NOT_ASSIGNED, f"{device} has no task in round {number} of {name}")
    asked = rows.read_round(db, name, number, attempt)
    if asked.max_staleness is None:
        return asked, asked.base_version
    live = rows.open_round(db, name)
    if live is None or live.max_staleness is None:
        raise Refused(Reason.ROUND_CLOSED, f"{name} takes no more updates: its last buffer is full, or it ended")
    if rows.has_given(db, name, live, device):
        raise Refused(Reason.CONFLICTING_UPDATE, f"this device's part in buffer {live.number} is already taken")
    return live, held[1]


def _check_names(db: Connection, offered: Contribution, live: Round, version: int, base_digest: str) -> None:
    release = db.execute("SELECT digest FROM releases WHERE run = ? AND version = ?", (offered.run, version)).fetchone()
    if offered.base_digest != base_digest:
        raise Refused(Reason.WRONG_BASE, f"the run's base is {base_digest[:12]}…, not {offered.base_digest[:12]}…")
    if offered.release_digest != release[0]:
        raise Refused(Reason.WRONG_BASE, f"round {offered.round} starts from release {release[0][:12]}…")
    if (live.kind == "evaluate") != (not offered.digest):
        raise Refused(Reason.BAD_REQUEST, f"round {live.number} is for {live.kind}")


def accept(db: Connection, offered: Contribution, now_us: int) -> Receipt:
    if receipt := check(db, offered, now_us):
        return receipt
    live, version = _landing(db, _key(offered))
    staleness = rounds.staleness(live, version)
    landed = (None, None) if live.max_staleness is None else (live.number, staleness)
    metrics = spec.canonical(offered.metrics).decode()
    values = (offered.digest, offered.size, offered.weight, offered.base_digest, offered.release_digest, metrics)
    db.execute(
        "INSERT INTO contributions (run, number, attempt, device, digest, size, weight, base_digest, release_digest,"
        " metrics, accepted_us, landed, staleness) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (*_key(offered), *values, now_us, *landed),
    )
    db.execute("UPDATE assignments SET state = 'accepted'" + rows.KEY, _key(offered))
    runs.move(db, offered.run, rounds.step(live, rounds.Accept(staleness), now_us), now_us)
    return Receipt(offered.run, offered.round, offered.attempt, offered.device, offered.digest)


def withdraw(db: Connection, device: str, now_us: int) -> None:
    """Take a device out of every round that is still open: its accepted updates, and its tasks."""
    for name in [run for (run,) in db.execute("SELECT run FROM rounds WHERE state = 'open'").fetchall()]:
        _withdraw_accepted(db, name, device, now_us)
    held = db.execute("SELECT run, number, attempt FROM assignments WHERE device = ? AND state = 'offered'", (device,))
    for name, number, attempt_ in held.fetchall():
        offers.leave(db, device, name, number, attempt_, now_us)


def _withdraw_accepted(db: Connection, name: str, device: str, now_us: int) -> None:
    """At most one update: a device's part in a round, or in a buffer."""
    live = rows.open_round(db, name)
    assert live is not None, "selected in this transaction"
    for given in rows.contributions(db, name, live.number, live.attempt):
        if given.device == device:
            db.execute("DELETE FROM contributions" + rows.KEY, _key(given))
            db.execute("UPDATE assignments SET state = 'left'" + rows.KEY, _key(given))
            rows.update_round(db, name, rounds.step(live, rounds.Withdraw(), now_us))
