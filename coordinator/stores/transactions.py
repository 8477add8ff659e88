"""What each transaction of a ledger does, over one open connection. The SQL is portable; sessions differ by engine.

Every function runs inside a transaction that its caller opens and commits: it reads rows, asks `rounds.step` what
follows, and writes rows. Raising undoes everything.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from coordinator import rounds
from coordinator.rounds import Round
from coordinator.stores import Offers, Run, devices
from coordinator.stores.connection import Connection
from wire import run_spec, spec
from wire.delta import Layout
from wire.errors import Reason, Refused
from wire.messages import Contribution, Metrics, Receipt, ReleaseManifest, Task
from wire.run_spec import RunSpec

_ROUND_COLUMNS = [f.name for f in dataclasses.fields(Round)]


def create_run(db: Connection, created: RunSpec, layout: Layout, release: ReleaseManifest, now_us: int) -> None:
    row = db.execute("SELECT spec_digest, layout_digest FROM runs WHERE name = ?", (created.name,)).fetchone()
    if row is not None:
        if tuple(row) == (created.digest, layout.digest) and read_release(db, created.name, 0) == release:
            return
        raise Refused(Reason.RUN_EXISTS, f"a run named {created.name!r} exists with another spec; choose another name")
    texts = (spec.canonical(created).decode(), spec.canonical(layout).decode(), created.digest, layout.digest)
    db.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, 'running', '', ?)", (created.name, *texts, now_us))
    _insert_release(db, release, 0, now_us)
    _insert_round(db, created.name, rounds.first(created))


def read_run(db: Connection, name: str) -> Run:
    row = db.execute("SELECT spec, layout, state FROM runs WHERE name = ?", (name,)).fetchone()
    if row is None:
        raise Refused(Reason.UNKNOWN_RUN, f"no run named {name!r}; `edgetune run list` shows them")
    return Run(run_spec.parse(json.loads(row[0])), Layout.parse(json.loads(row[1])), row[2])


def names(db: Connection) -> list[str]:
    return [name for (name,) in db.execute("SELECT name FROM runs ORDER BY created_us, name").fetchall()]


def offer(db: Connection, device: str, wanted: tuple[str, ...], now_us: int) -> Offers:
    devices.check_not_revoked(db, device)
    states = dict(db.execute("SELECT name, state FROM runs ORDER BY created_us, name").fetchall())
    if missing := [name for name in wanted if name not in states]:
        raise Refused(Reason.UNKNOWN_RUN, f"no run named {missing[0]!r}; `edgetune run list` shows them")
    asked = wanted or tuple(states)
    active = [name for name in asked if states[name] == "running"]
    ended = tuple(name for name in asked if states[name] != "running")
    for name in active:
        if task := _offer_in(db, device, name, now_us):
            return Offers(task, len(active), ended)
    return Offers(None, len(active), ended)


def _offer_in(db: Connection, device: str, name: str, now_us: int) -> Task | None:
    live = live_round(db, name)
    if live is None or live.state != "open":
        return None
    key = (name, live.number, live.attempt, device)
    held = db.execute(
        "SELECT state FROM assignments WHERE run = ? AND number = ? AND attempt = ? AND device = ?", key
    ).fetchone()
    if held is not None and held[0] == "accepted":
        return None
    if held is None or held[0] == "left":
        if not rounds.can_offer(live, now_us) or _owner_is_full(db, name, live, device):
            return None
        live = rounds.step(live, rounds.Offer(), now_us)
        _update_round(db, name, live)
        db.execute(
            "INSERT INTO assignments VALUES (?, ?, ?, ?, 'offered')"
            " ON CONFLICT (run, number, attempt, device) DO UPDATE SET state = 'offered'",
            key,
        )
    return _task(db, name, live, now_us)


def _owner_is_full(db: Connection, name: str, live: Round, device: str) -> bool:
    seats = read_run(db, name).spec.cohort.owner_seats
    return seats is not None and devices.owner_is_full(db, name, live.number, live.attempt, device, seats)


def _task(db: Connection, name: str, live: Round, now_us: int) -> Task:
    digests = db.execute("SELECT spec_digest, layout_digest FROM runs WHERE name = ?", (name,)).fetchone()
    release = db.execute(
        "SELECT digest FROM releases WHERE run = ? AND version = ?", (name, live.base_version)
    ).fetchone()
    left_s = max(0.0, ((live.deadline_us or now_us) - now_us) / 1e6)
    spec_digest, layout_digest = digests
    return Task(
        name, live.number, live.attempt, live.kind, live.base_version, release[0], spec_digest, layout_digest, left_s
    )


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
    key = (offered.run, offered.round, offered.attempt, offered.device)
    spec_text = db.execute("SELECT spec FROM runs WHERE name = ?", (offered.run,)).fetchone()
    if spec_text is None:
        raise Refused(Reason.UNKNOWN_RUN, f"no run named {offered.run!r}")
    where = " WHERE run = ? AND number = ? AND attempt = ? AND device = ?"
    known = db.execute("SELECT digest FROM contributions" + where, key).fetchone()
    if known is not None:
        if known[0] != offered.digest:
            raise Refused(
                Reason.CONFLICTING_UPDATE, "this device's part in the round is already taken by another payload"
            )
        return Receipt(offered.run, offered.round, offered.attempt, offered.device, offered.digest)
    held = db.execute("SELECT state FROM assignments" + where, key).fetchone()
    if held is None or held[0] != "offered":
        raise Refused(Reason.NOT_ASSIGNED, f"{offered.device} has no task in round {offered.round} of {offered.run}")
    live = read_round(db, offered.run, offered.round, offered.attempt)
    rounds.step(live, rounds.Accept(), now_us)
    _check_names(db, offered, live, json.loads(spec_text[0])["base"]["digest"])
    return None


def _check_names(db: Connection, offered: Contribution, live: Round, base_digest: str) -> None:
    release = db.execute(
        "SELECT digest FROM releases WHERE run = ? AND version = ?", (offered.run, live.base_version)
    ).fetchone()
    if offered.base_digest != base_digest:
        raise Refused(Reason.WRONG_BASE, f"the run's base is {base_digest[:12]}…, not {offered.base_digest[:12]}…")
    if offered.release_digest != release[0]:
        raise Refused(Reason.WRONG_BASE, f"round {live.number} starts from release {release[0][:12]}…")
    if (live.kind == "evaluate") != (not offered.digest):
        raise Refused(Reason.BAD_REQUEST, f"round {live.number} is for {live.kind}")


def accept(db: Connection, offered: Contribution, now_us: int) -> Receipt:
    if receipt := check(db, offered, now_us):
        return receipt
    key = (offered.run, offered.round, offered.attempt, offered.device)
    live = rounds.step(read_round(db, *key[:3]), rounds.Accept(), now_us)
    metrics = spec.canonical(offered.metrics).decode()
    values = (offered.digest, offered.size, offered.weight, offered.base_digest, offered.release_digest, metrics)
    db.execute("INSERT INTO contributions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (*key, *values, now_us))
    db.execute(
        "UPDATE assignments SET state = 'accepted' WHERE run = ? AND number = ? AND attempt = ? AND device = ?", key
    )
    _update_round(db, offered.run, live)
    if live.state == "published":  # an evaluation has nothing to combine: the run ends here
        _end_run(db, offered.run, "done", "")
    return Receipt(offered.run, offered.round, offered.attempt, offered.device, offered.digest)


def withdraw(db: Connection, device: str, now_us: int) -> list[str]:
    """Take a device out of every round that is still open, its accepted update too; the runs that this changed."""
    rows = db.execute(
        "SELECT run, number, attempt, assignments.state FROM assignments JOIN rounds USING (run, number, attempt)"
        " WHERE device = ? AND assignments.state IN ('offered', 'accepted') AND rounds.state = 'open'",
        (device,),
    ).fetchall()
    for name, number, attempt, held in rows:
        key = (name, number, attempt, device)
        where = " WHERE run = ? AND number = ? AND attempt = ? AND device = ?"
        db.execute("DELETE FROM contributions" + where, key)
        db.execute("UPDATE assignments SET state = 'left'" + where, key)
        event = rounds.Withdraw() if held == "accepted" else rounds.Leave()
        _update_round(db, name, rounds.step(read_round(db, name, number, attempt), event, now_us))
    return [name for name, *_ in rows]


def refuse(db: Connection, name: str, reason: Reason) -> None:
    if db.execute("SELECT 1 FROM runs WHERE name = ?", (name,)).fetchone():
        db.execute(
            "INSERT INTO refusals VALUES (?, ?, 1) ON CONFLICT (run, reason) DO UPDATE SET count = refusals.count + 1",
            (name, reason.value),
        )


def tick(db: Connection, now_us: int) -> list[str]:
    due = db.execute(
        "SELECT run FROM rounds WHERE state = 'open' AND deadline_us IS NOT NULL AND deadline_us <= ?", (now_us,)
    ).fetchall()
    for (name,) in due:
        _expire(db, name, now_us)
    return [name for (name,) in due]


def _expire(db: Connection, name: str, now_us: int) -> None:
    live = live_round(db, name)
    assert live is not None, "selected in this transaction"
    ended = rounds.step(live, rounds.Tick(), now_us)
    _update_round(db, name, ended)
    if ended.state == "published":
        _end_run(db, name, "done", "")
    elif ended.state == "abandoned":
        again = rounds.retry(read_run(db, name).spec, ended)
        if again is not None:
            _insert_round(db, name, again)
        else:
            _end_run(db, name, "failed", f"round {ended.number} missed its minimum {ended.attempt} times")


def sealed(db: Connection) -> list[tuple[str, Round]]:
    columns = ", ".join(_ROUND_COLUMNS)
    rows = db.execute(f"SELECT run, {columns} FROM rounds WHERE state = 'sealed'").fetchall()  # constants
    return [(row[0], Round(*row[1:])) for row in rows]


def contributions(db: Connection, name: str, number: int, attempt: int) -> list[Contribution]:
    rows = db.execute(
        "SELECT metrics, device, run, number, attempt, digest, size, weight, base_digest, release_digest"
        " FROM contributions WHERE run = ? AND number = ? AND attempt = ?",
        (name, number, attempt),
    ).fetchall()
    return sorted((_contribution(*row) for row in rows), key=lambda c: c.device)  # engines sort text by different rules


def _contribution(metrics: str, *rest: Any) -> Contribution:
    return Contribution(*[*rest, spec.parse(Metrics, json.loads(metrics), "metrics")])


def named_blobs(db: Connection) -> set[str]:
    """The digests of all that contributions and releases are made of."""
    named = {digest for (digest,) in db.execute("SELECT digest FROM contributions WHERE digest <> ''").fetchall()}
    for (manifest,) in db.execute("SELECT manifest FROM releases").fetchall():
        release = ReleaseManifest.parse(manifest)
        named.update(filter(None, (release.adapter, release.optimizer_state, release.step)))
    return named


def publish(db: Connection, name: str, done: Round, release: ReleaseManifest, now_us: int) -> bool:
    live = live_round(db, name)
    if live != done:
        return False
    published = rounds.step(live, rounds.Publish(), now_us)
    if _update_round(db, name, published) != 1:
        return False
    _insert_release(db, release, published.attempt, now_us)
    following = rounds.after(read_run(db, name).spec, published, now_us)
    assert following is not None, "a training round is always followed by one more"
    _insert_round(db, name, following)
    return True


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


def live_round(db: Connection, name: str) -> Round | None:
    columns = ", ".join(_ROUND_COLUMNS)
    query = f"SELECT {columns} FROM rounds WHERE run = ? AND state IN ('open', 'sealed')"  # constants
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
    values = (changed.state, changed.deadline_us, changed.offered, changed.accepted)
    return db.execute(
        "UPDATE rounds SET state = ?, deadline_us = ?, offered = ?, accepted = ?"
        " WHERE run = ? AND number = ? AND attempt = ? AND state IN ('open', 'sealed')",
        (*values, name, changed.number, changed.attempt),
    ).rowcount


def _insert_release(db: Connection, release: ReleaseManifest, attempt: int, now_us: int) -> None:
    manifest = spec.canonical(release).decode()
    values = (release.run, release.version, release.digest, manifest, attempt, now_us)
    db.execute("INSERT INTO releases VALUES (?, ?, ?, ?, ?, ?)", values)


def _end_run(db: Connection, name: str, state: str, detail: str) -> None:
    db.execute("UPDATE runs SET state = ?, detail = ? WHERE name = ?", (state, detail, name))
