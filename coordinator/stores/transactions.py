"""What each transaction of a ledger does, over one open connection. The SQL is portable; sessions differ by engine.

Every function runs inside a transaction that its caller opens and commits: it reads rows, asks `rounds.step` what
follows, and writes rows. Raising undoes everything.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

from coordinator import pacing, rounds
from coordinator.rounds import Round
from coordinator.stores import Ask, Offers, Run, devices
from coordinator.stores.connection import Connection
from wire import run_spec, spec
from wire.delta import Layout
from wire.errors import EdgetuneError, Reason, Refused
from wire.messages import ENDED, MAX_REASON, Contribution, Control, Metrics, Receipt, ReleaseManifest, Task
from wire.run_spec import RunSpec

_ROUND_COLUMNS = [f.name for f in dataclasses.fields(Round)]
_STATE = "COALESCE(NULLIF(decision, ''), state)"
_KEY = " WHERE run = ? AND number = ? AND attempt = ? AND device = ?"


def create_run(db: Connection, created: RunSpec, layout: Layout, release: ReleaseManifest, now_us: int) -> None:
    row = db.execute("SELECT spec_digest, layout_digest FROM runs WHERE name = ?", (created.name,)).fetchone()
    if row is not None:
        if tuple(row) == (created.digest, layout.digest) and read_release(db, created.name, 0) == release:
            return
        raise Refused(Reason.RUN_EXISTS, f"a run named {created.name!r} exists with another spec; choose another name")
    texts = (spec.canonical(created).decode(), spec.canonical(layout).decode(), created.digest, layout.digest)
    db.execute(
        "INSERT INTO runs (name, spec, layout, spec_digest, layout_digest, state, created_us)"
        " VALUES (?, ?, ?, ?, ?, 'running', ?)",
        (created.name, *texts, now_us),
    )
    _insert_release(db, release, 0, now_us)
    _insert_round(db, created.name, rounds.first(created))


def read_run(db: Connection, name: str) -> Run:
    row = db.execute(f"SELECT spec, layout, {_STATE} FROM runs WHERE name = ?", (name,)).fetchone()  # constants
    if row is None:
        raise Refused(Reason.UNKNOWN_RUN, f"no run named {name!r}; `edgetune run list` shows them")
    return Run(run_spec.parse(json.loads(row[0])), Layout.parse(json.loads(row[1])), row[2])


def names(db: Connection) -> list[str]:
    return [name for (name,) in db.execute("SELECT name FROM runs ORDER BY created_us, name").fetchall()]


def offer(db: Connection, device: str, wanted: tuple[str, ...], now_us: int) -> Offers:
    devices.check_not_revoked(db, device)
    states = dict(db.execute(f"SELECT name, {_STATE} FROM runs ORDER BY created_us, name").fetchall())  # constants
    if missing := [name for name in wanted if name not in states]:
        raise Refused(Reason.UNKNOWN_RUN, f"no run named {missing[0]!r}; `edgetune run list` shows them")
    asked = wanted or tuple(states)
    active = [name for name in asked if states[name] not in ENDED]
    ended = tuple(name for name in asked if states[name] in ENDED)
    for name in active:
        if task := _offer_in(db, device, name, now_us):
            return Offers(task, len(active), ended)
    return Offers(None, len(active), ended, _next_work_s(db, active, now_us))


def offer_together(db: Connection, asks: Sequence[Ask], now_us: int) -> list[Offers | EdgetuneError]:
    answers: list[Offers | EdgetuneError | None] = [None] * len(asks)
    for at in _by_lot(db, asks):
        try:
            answers[at] = offer(db, asks[at].device, asks[at].runs, now_us)
        except Refused as error:  # raised before anything was written
            answers[at] = error
    return [answer for answer in answers if answer is not None]


def _by_lot(db: Connection, asks: Sequence[Ask]) -> list[int]:
    """Whom to ask first, by the first run it wants that takes updates."""
    if len(asks) < 2:
        return list(range(len(asks)))
    rows = db.execute(
        "SELECT runs.name, runs.spec, rounds.number, rounds.attempt FROM runs JOIN rounds ON rounds.run = runs.name"
        " WHERE rounds.state = 'open' ORDER BY runs.created_us, runs.name"
    ).fetchall()
    live = {name: (json.loads(text)["seed"], name, number, attempt) for name, text, number, attempt in rows}

    def lot(at: int) -> bytes:
        wanted = next((name for name in asks[at].runs or live if name in live), None)
        return b"" if wanted is None else pacing.lot(*live[wanted], asks[at].device)

    return sorted(range(len(asks)), key=lot)


def _offer_in(db: Connection, device: str, name: str, now_us: int) -> Task | None:
    live = open_round(db, name)
    if live is None or live.paused_us is not None or _has_given(db, name, live, device):
        return None
    if held := _task_under_way(db, name, live, device):
        return _task(db, name, live, *held, now_us)
    version = _newest_version(db, name)
    if not rounds.can_offer(live, now_us, version) or _owner_is_full(db, name, live, device):
        return None
    live = rounds.step(live, rounds.Offer(), now_us)
    _update_round(db, name, live)
    db.execute(
        "INSERT INTO assignments (run, number, attempt, device, state, version) VALUES (?, ?, ?, ?, 'offered', ?)"
        " ON CONFLICT (run, number, attempt, device) DO UPDATE SET state = 'offered', version = excluded.version",
        (name, live.number, live.attempt, device, version),
    )
    return _task(db, name, live, live.number, live.attempt, version, now_us)


def _owner_is_full(db: Connection, name: str, live: Round, device: str) -> bool:
    seats = read_run(db, name).spec.cohort.owner_seats
    return seats is not None and devices.seats_of_others(db, name, live, device) >= seats


def _has_given(db: Connection, name: str, live: Round, device: str) -> bool:
    """A device's part in a round is one update."""
    if live.max_staleness is not None:
        query, key = "SELECT 1 FROM contributions WHERE run = ? AND landed = ? AND device = ?", (live.number, device)
        return db.execute(query, (name, *key)).fetchone() is not None
    key_here = (name, live.number, live.attempt, device)
    return db.execute("SELECT 1 FROM assignments" + _KEY + " AND state = 'accepted'", key_here).fetchone() is not None


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
    live = [open_round(db, name) for name in active]
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
        _update_round(db, name, rounds.step(read_round(db, name, number, attempt), rounds.Leave(), now_us))


def check(db: Connection, offered: Contribution, now_us: int) -> Receipt | None:
    """The receipt if it is in already, None if it may come in; raises what `accept` would raise."""
    devices.check_not_revoked(db, offered.device)
    spec_text = db.execute("SELECT spec FROM runs WHERE name = ?", (offered.run,)).fetchone()
    if spec_text is None:
        raise Refused(Reason.UNKNOWN_RUN, f"no run named {offered.run!r}")
    known = db.execute("SELECT digest FROM contributions" + _KEY, _key(offered)).fetchone()
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


Key = tuple[str, int, int, str]
"""Run, round, attempt and device: whose task it is."""


def check_open(db: Connection, key: Key, now_us: int) -> tuple[Round, int]:
    """As `_landing`; raises what an update for this task would be refused by, before it has come."""
    live, version = _landing(db, key)
    rounds.step(live, rounds.Accept(rounds.staleness(live, version)), now_us)
    return live, version


def _landing(db: Connection, key: Key) -> tuple[Round, int]:
    """The round in which a task's update would count, and the version of the release its device was given: the round of
    its task, or, if that was a buffer, the buffer that is open now."""
    name, number, attempt, device = key
    held = db.execute("SELECT state, version FROM assignments" + _KEY, key).fetchone()
    if held is None or held[0] != "offered":
        raise Refused(Reason.NOT_ASSIGNED, f"{device} has no task in round {number} of {name}")
    asked = read_round(db, name, number, attempt)
    if asked.max_staleness is None:
        return asked, asked.base_version
    live = open_round(db, name)
    if live is None or live.max_staleness is None:
        raise Refused(Reason.ROUND_CLOSED, f"{name} takes no more updates: its last buffer is full, or it ended")
    if _has_given(db, name, live, device):
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
    db.execute("UPDATE assignments SET state = 'accepted'" + _KEY, _key(offered))
    _move(db, offered.run, rounds.step(live, rounds.Accept(staleness), now_us), now_us)
    return Receipt(offered.run, offered.round, offered.attempt, offered.device, offered.digest)


def withdraw(db: Connection, device: str, now_us: int) -> None:
    """Take a device out of every round that is still open: its accepted updates, and its tasks."""
    for name in [run for (run,) in db.execute("SELECT run FROM rounds WHERE state = 'open'").fetchall()]:
        _withdraw_accepted(db, name, device, now_us)
    held = db.execute("SELECT run, number, attempt FROM assignments WHERE device = ? AND state = 'offered'", (device,))
    for name, number, attempt_ in held.fetchall():
        leave(db, device, name, number, attempt_, now_us)


def _withdraw_accepted(db: Connection, name: str, device: str, now_us: int) -> None:
    """At most one update: a device's part in a round, or in a buffer."""
    live = open_round(db, name)
    assert live is not None, "selected in this transaction"
    for given in contributions(db, name, live.number, live.attempt):
        if given.device == device:
            db.execute("DELETE FROM contributions" + _KEY, _key(given))
            db.execute("UPDATE assignments SET state = 'left'" + _KEY, _key(given))
            _update_round(db, name, rounds.step(live, rounds.Withdraw(), now_us))


def _move(db: Connection, name: str, moved: Round, now_us: int) -> None:
    """Write a round down as it is now, and what follows from that."""
    _update_round(db, name, moved)
    match moved.state:
        case "published":  # an evaluation has nothing to combine: the run ends here
            _end_run(db, name, "done", "")
        case "sealed":
            _open(db, name, rounds.next_buffer(read_run(db, name).spec, moved), now_us)
        case "abandoned":
            again = rounds.retry(read_run(db, name).spec, moved)
            _open(db, name, again, now_us)
            if again is None:
                _end_run(db, name, "failed", f"round {moved.number} missed its minimum {moved.attempt} times")


def _open(db: Connection, name: str, fresh: Round | None, now_us: int) -> None:
    """Open what follows, if anything does, as the person left the run: paused or not."""
    if fresh is not None:
        paused = _run_state(db, name) == "paused"
        _insert_round(db, name, rounds.step(fresh, rounds.Pause(), now_us) if paused else fresh)


def control(db: Connection, name: str, action: Control, reason: str, now_us: int) -> None:
    if len(reason) > MAX_REASON or not reason.isprintable():
        raise Refused(Reason.BAD_REQUEST, f"a reason is one line of at most {MAX_REASON} characters")
    state = _run_state(db, name)
    if state == {"pause": "paused", "resume": "running", "stop": "stopped"}[action]:
        return
    if state in ENDED:
        raise Refused(Reason.RUN_ENDED, f"run {name!r} is {state} already: nothing is left to {action}")
    write, event = _CONTROLS[action]
    write(db, name, reason)
    if live := open_round(db, name):
        _update_round(db, name, rounds.step(live, event, now_us))


def _pause(db: Connection, name: str, reason: str) -> None:
    db.execute("UPDATE runs SET decision = 'paused', detail = ? WHERE name = ?", (reason, name))


def _resume(db: Connection, name: str, reason: str) -> None:
    db.execute("UPDATE runs SET decision = '', detail = ? WHERE name = ?", (reason, name))


def _stop(db: Connection, name: str, reason: str) -> None:
    _end_run(db, name, "done", reason)
    db.execute("UPDATE runs SET decision = 'stopped' WHERE name = ?", (name,))


_CONTROLS: dict[Control, tuple[Callable[[Connection, str, str], None], rounds.Event]] = {
    "pause": (_pause, rounds.Pause()),
    "resume": (_resume, rounds.Resume()),
    "stop": (_stop, rounds.Stop()),
}


def _run_state(db: Connection, name: str) -> str:
    row = db.execute(f"SELECT {_STATE} FROM runs WHERE name = ?", (name,)).fetchone()  # constants
    if row is None:
        raise Refused(Reason.UNKNOWN_RUN, f"no run named {name!r}; `edgetune run list` shows them")
    return str(row[0])


def refuse(db: Connection, name: str, reason: Reason) -> None:
    if db.execute("SELECT 1 FROM runs WHERE name = ?", (name,)).fetchone():
        db.execute(
            "INSERT INTO refusals VALUES (?, ?, 1) ON CONFLICT (run, reason) DO UPDATE SET count = refusals.count + 1",
            (name, reason.value),
        )


def tick(db: Connection, now_us: int) -> list[str]:
    due = db.execute(
        "SELECT run FROM rounds WHERE state = 'open' AND deadline_us <= COALESCE(paused_us, ?)", (now_us,)
    ).fetchall()
    for (name,) in due:
        _expire(db, name, now_us)
    return [name for (name,) in due]


def _expire(db: Connection, name: str, now_us: int) -> None:
    live = open_round(db, name)
    assert live is not None, "selected in this transaction"
    _move(db, name, rounds.step(live, rounds.Tick(), now_us), now_us)


def sealed(db: Connection) -> list[tuple[str, Round]]:
    """Those whose base is published: buffers become releases in their order."""
    columns = ", ".join(f"rounds.{name}" for name in _ROUND_COLUMNS)
    rows = db.execute(
        f"SELECT rounds.run, {columns} FROM rounds JOIN releases"  # constants
        " ON releases.run = rounds.run AND releases.version = rounds.base_version WHERE rounds.state = 'sealed'"
    ).fetchall()
    return [(row[0], Round(*row[1:])) for row in rows]


def rounds_by_state(db: Connection) -> dict[str, int]:
    return dict(db.execute("SELECT state, COUNT(*) FROM rounds GROUP BY state").fetchall())


def contributions(db: Connection, name: str, number: int, attempt: int) -> list[Contribution]:
    in_round = _contributions(db, "landed IS NULL AND run = ? AND number = ? AND attempt = ?", name, number, attempt)
    in_buffer = _contributions(db, "run = ? AND landed = ?", name, number)
    return sorted(in_round + in_buffer, key=lambda c: c.device)  # engines sort text by different rules


def measured(db: Connection, name: str, release_digest: str) -> list[Contribution]:
    """What started from a release, oldest round first."""
    found = _contributions(db, "run = ? AND release_digest = ?", name, release_digest)
    return sorted(found, key=lambda c: (c.round, c.attempt, c.device))


def _contributions(db: Connection, where: str, *values: Any) -> list[Contribution]:
    rows = db.execute(
        "SELECT metrics, staleness, device, run, number, attempt, digest, size, weight, base_digest, release_digest"
        f" FROM contributions WHERE {where}",  # constants
        values,
    ).fetchall()
    return [_contribution(*row) for row in rows]


def _contribution(metrics: str, staleness: int | None, *rest: Any) -> Contribution:
    return Contribution(*[*rest, spec.parse(Metrics, json.loads(metrics), "metrics"), staleness])


def named_blobs(db: Connection) -> set[str]:
    """The digests of all that contributions and releases are made of."""
    named = {digest for (digest,) in db.execute("SELECT digest FROM contributions WHERE digest <> ''").fetchall()}
    for (manifest,) in db.execute("SELECT manifest FROM releases").fetchall():
        release = ReleaseManifest.parse(manifest)
        named.update(filter(None, (release.adapter, release.optimizer_state, release.step)))
    return named


def publish(db: Connection, name: str, done: Round, release: ReleaseManifest, now_us: int) -> bool:
    if read_round(db, name, done.number, done.attempt) != done or _newest_version(db, name) != done.base_version:
        return False
    published = rounds.step(done, rounds.Publish(), now_us)
    if _update_round(db, name, published) != 1:
        return False
    _insert_release(db, release, published.attempt, now_us)
    if _run_state(db, name) not in ENDED:
        _open(db, name, rounds.after(read_run(db, name).spec, published, now_us), now_us)
    return True


def _newest_version(db: Connection, name: str) -> int:
    return int(db.execute("SELECT MAX(version) FROM releases WHERE run = ?", (name,)).fetchone()[0])


def read_release(db: Connection, name: str, version: int | None) -> ReleaseManifest:
    newest = "SELECT MAX(version) FROM releases WHERE run = ?"
    wanted = version if version is not None else db.execute(newest, (name,)).fetchone()[0]
    row = db.execute("SELECT manifest FROM releases WHERE run = ? AND version = ?", (name, wanted)).fetchone()
    if row is None:
        raise Refused(Reason.UNKNOWN_RELEASE, f"no release {wanted} of {name!r}")
    return ReleaseManifest.parse(row[0])


def attempt(db: Connection, name: str, version: int) -> int:
    row = db.execute("SELECT attempt FROM releases WHERE run = ? AND version = ?", (name, version)).fetchone()
    if row is None:
        raise Refused(Reason.UNKNOWN_RELEASE, f"no release {version} of {name!r}")
    return int(row[0])


def open_round(db: Connection, name: str) -> Round | None:
    """The one that takes updates."""
    columns = ", ".join(_ROUND_COLUMNS)
    query = f"SELECT {columns} FROM rounds WHERE run = ? AND state = 'open'"  # constants
    row = db.execute(query, (name,)).fetchone()
    return None if row is None else Round(*row)


def read_round(db: Connection, name: str, number: int, attempt: int) -> Round:
    columns = ", ".join(_ROUND_COLUMNS)
    query = f"SELECT {columns} FROM rounds WHERE run = ? AND number = ? AND attempt = ?"  # constants
    row = db.execute(query, (name, number, attempt)).fetchone()
    if row is None:
        raise Refused(Reason.NOT_ASSIGNED, f"no round {number} (attempt {attempt}) of {name!r}")
    return Round(*row)


def _insert_round(db: Connection, name: str, fresh: Round) -> None:
    values: dict[str, Any] = dataclasses.asdict(fresh)
    marks = ", ".join("?" * (len(values) + 1))
    columns = ", ".join(values)
    db.execute(f"INSERT INTO rounds (run, {columns}) VALUES ({marks})", (name, *values.values()))  # constants


def _update_round(db: Connection, name: str, changed: Round) -> int:
    """Rows that changed: one, or none where the round has ended meanwhile."""
    values = (changed.state, changed.deadline_us, changed.offered, changed.accepted, changed.paused_us)
    return db.execute(
        "UPDATE rounds SET state = ?, deadline_us = ?, offered = ?, accepted = ?, paused_us = ?"
        " WHERE run = ? AND number = ? AND attempt = ? AND state IN ('open', 'sealed')",
        (*values, name, changed.number, changed.attempt),
    ).rowcount


def _insert_release(db: Connection, release: ReleaseManifest, attempt: int, now_us: int) -> None:
    manifest = spec.canonical(release).decode()
    values = (release.run, release.version, release.digest, manifest, attempt, now_us)
    db.execute("INSERT INTO releases VALUES (?, ?, ?, ?, ?, ?)", values)


def _end_run(db: Connection, name: str, state: str, detail: str) -> None:
    db.execute("UPDATE runs SET state = ?, detail = ?, decision = '' WHERE name = ?", (state, detail, name))
