"""What rows say of runs, rounds, releases and updates, and how they are written. Nothing is decided here.

The SQL is portable; sessions differ by engine.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from coordinator.rounds import Round
from coordinator.stores import Run
from coordinator.stores.connection import Connection
from wire import run_spec, spec
from wire.delta import Layout
from wire.errors import Reason, Refused
from wire.messages import Contribution, Metrics, ReleaseManifest

ROUND_COLUMNS = [f.name for f in dataclasses.fields(Round)]
STATE = "COALESCE(NULLIF(decision, ''), state)"
KEY = " WHERE run = ? AND number = ? AND attempt = ? AND device = ?"


def read_run(db: Connection, name: str) -> Run:
    """BUSY for a run that only newer replicas can read: whoever asks again meets one, in the end."""
    row = db.execute(f"SELECT spec, layout, {STATE}, edition FROM runs WHERE name = ?", (name,)).fetchone()  # constants
    if row is None:
        raise Refused(Reason.UNKNOWN_RUN, f"no run named {name!r}; `edgetune run list` shows them")
    if row[3] > run_spec.EDITION:
        raise Refused(Reason.BUSY, f"this coordinator process is older than run {name!r}; ask another, or upgrade it")
    return Run(run_spec.parse(json.loads(row[0])), Layout.parse(json.loads(row[1])), row[2])


def names(db: Connection) -> list[str]:
    query = "SELECT name FROM runs WHERE edition <= ? ORDER BY created_us, name"
    return [name for (name,) in db.execute(query, (run_spec.EDITION,)).fetchall()]


def run_state(db: Connection, name: str) -> str:
    row = db.execute(f"SELECT {STATE} FROM runs WHERE name = ?", (name,)).fetchone()  # constants
    if row is None:
        raise Refused(Reason.UNKNOWN_RUN, f"no run named {name!r}; `edgetune run list` shows them")
    return str(row[0])


def end_run(db: Connection, name: str, state: str, detail: str) -> None:
    db.execute("UPDATE runs SET state = ?, detail = ?, decision = '' WHERE name = ?", (state, detail, name))


def open_round(db: Connection, name: str) -> Round | None:
    """The one that takes updates."""
    columns = ", ".join(ROUND_COLUMNS)
    query = f"SELECT {columns} FROM rounds WHERE run = ? AND state = 'open'"  # constants
    row = db.execute(query, (name,)).fetchone()
    return None if row is None else Round(*row)


def read_round(db: Connection, name: str, number: int, attempt: int) -> Round:
    columns = ", ".join(ROUND_COLUMNS)
    query = f"SELECT {columns} FROM rounds WHERE run = ? AND number = ? AND attempt = ?"  # constants
    row = db.execute(query, (name, number, attempt)).fetchone()
    if row is None:
        raise Refused(Reason.NOT_ASSIGNED, f"no round {number} (attempt {attempt}) of {name!r}")
    return Round(*row)


def insert_round(db: Connection, name: str, fresh: Round) -> None:
    values: dict[str, Any] = dataclasses.asdict(fresh)
    marks = ", ".join("?" * (len(values) + 1))
    columns = ", ".join(values)
    db.execute(f"INSERT INTO rounds (run, {columns}) VALUES ({marks})", (name, *values.values()))  # constants


def update_round(db: Connection, name: str, changed: Round) -> int:
    """Rows that changed: one, or none where the round has ended meanwhile."""
    values = (changed.state, changed.deadline_us, changed.offered, changed.accepted, changed.paused_us)
    return db.execute(
        "UPDATE rounds SET state = ?, deadline_us = ?, offered = ?, accepted = ?, paused_us = ?"
        " WHERE run = ? AND number = ? AND attempt = ? AND state IN ('open', 'sealed')",
        (*values, name, changed.number, changed.attempt),
    ).rowcount


def read_release(db: Connection, name: str, version: int | None) -> ReleaseManifest:
    newest = "SELECT MAX(version) FROM releases WHERE run = ?"
    wanted = version if version is not None else db.execute(newest, (name,)).fetchone()[0]
    row = db.execute("SELECT manifest FROM releases WHERE run = ? AND version = ?", (name, wanted)).fetchone()
    if row is None:
        raise Refused(Reason.UNKNOWN_RELEASE, f"no release {wanted} of {name!r}")
    return ReleaseManifest.parse(row[0])


def newest_version(db: Connection, name: str) -> int:
    return int(db.execute("SELECT MAX(version) FROM releases WHERE run = ?", (name,)).fetchone()[0])


def attempt(db: Connection, name: str, version: int) -> int:
    row = db.execute("SELECT attempt FROM releases WHERE run = ? AND version = ?", (name, version)).fetchone()
    if row is None:
        raise Refused(Reason.UNKNOWN_RELEASE, f"no release {version} of {name!r}")
    return int(row[0])


def insert_release(db: Connection, release: ReleaseManifest, attempt: int, now_us: int) -> None:
    manifest = spec.canonical(release).decode()
    values = (release.run, release.version, release.digest, manifest, attempt, now_us)
    db.execute(
        "INSERT INTO releases (run, version, digest, manifest, attempt, published_us) VALUES (?, ?, ?, ?, ?, ?)", values
    )


def contributions(db: Connection, name: str, number: int, attempt: int) -> list[Contribution]:
    in_round = _contributions(db, "landed IS NULL AND run = ? AND number = ? AND attempt = ?", name, number, attempt)
    in_buffer = _contributions(db, "run = ? AND landed = ?", name, number)
    return sorted(in_round + in_buffer, key=lambda c: c.device)  # engines sort text by different rules


def measured(db: Connection, name: str, release_digest: str) -> list[Contribution]:
    """What started from a release, oldest round first."""
    found = _contributions(db, "run = ? AND release_digest = ?", name, release_digest)
    return sorted(found, key=lambda c: (c.round, c.attempt, c.device))


def _contributions(db: Connection, where: str, *values: Any) -> list[Contribution]:
    found = db.execute(
        "SELECT metrics, staleness, device, run, number, attempt, digest, size, weight, base_digest, release_digest"
        f" FROM contributions WHERE {where}",  # constants
        values,
    ).fetchall()
    return [_contribution(*row) for row in found]


def _contribution(metrics: str, staleness: int | None, *rest: Any) -> Contribution:
    return Contribution(*[*rest, spec.told(Metrics, json.loads(metrics), "metrics"), staleness])


def has_given(db: Connection, name: str, live: Round, device: str) -> bool:
    """A device's part in a round is one update."""
    if live.max_staleness is not None:
        query, key = "SELECT 1 FROM contributions WHERE run = ? AND landed = ? AND device = ?", (live.number, device)
        return db.execute(query, (name, *key)).fetchone() is not None
    key_here = (name, live.number, live.attempt, device)
    return db.execute("SELECT 1 FROM assignments" + KEY + " AND state = 'accepted'", key_here).fetchone() is not None


def named_blobs(db: Connection) -> set[str]:
    """The digests of all that contributions and releases are made of."""
    named = {digest for (digest,) in db.execute("SELECT digest FROM contributions WHERE digest <> ''").fetchall()}
    for (manifest,) in db.execute("SELECT manifest FROM releases").fetchall():
        named.update(ReleaseManifest.parse(manifest).blobs)
    return named
