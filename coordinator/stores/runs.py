"""The transactions that move a run on: it is created, controlled, sealed, published.

Every function runs inside a transaction that its caller opens and commits: it reads rows, asks `rounds.step` what
follows, and writes rows. Raising undoes everything.
"""

from __future__ import annotations

from collections.abc import Callable

from coordinator import rounds
from coordinator.rounds import Round
from coordinator.stores import rows
from coordinator.stores.connection import Connection
from wire import run_spec, spec
from wire.delta import Layout
from wire.errors import Reason, Refused
from wire.messages import ENDED, MAX_REASON, Control, ReleaseManifest
from wire.run_spec import RunSpec


def create_run(db: Connection, created: RunSpec, layout: Layout, release: ReleaseManifest, now_us: int) -> None:
    row = db.execute("SELECT spec_digest, layout_digest FROM runs WHERE name = ?", (created.name,)).fetchone()
    if row is not None:
        if tuple(row) == (created.digest, layout.digest) and rows.read_release(db, created.name, 0) == release:
            return
        raise Refused(Reason.RUN_EXISTS, f"a run named {created.name!r} exists with another spec; choose another name")
    texts = (spec.canonical(created).decode(), spec.canonical(layout).decode(), created.digest, layout.digest)
    db.execute(
        "INSERT INTO runs (name, spec, layout, spec_digest, layout_digest, edition, state, created_us)"
        " VALUES (?, ?, ?, ?, ?, ?, 'running', ?)",
        (created.name, *texts, created.edition, now_us),
    )
    rows.insert_release(db, release, 0, now_us)
    rows.insert_round(db, created.name, rounds.first(created))


def control(db: Connection, name: str, action: Control, reason: str, now_us: int) -> None:
    if len(reason) > MAX_REASON or not reason.isprintable():
        raise Refused(Reason.BAD_REQUEST, f"a reason is one line of at most {MAX_REASON} characters")
    state = rows.run_state(db, name)
    if state == {"pause": "paused", "resume": "running", "stop": "stopped"}[action]:
        return
    if state in ENDED:
        raise Refused(Reason.RUN_ENDED, f"run {name!r} has ended: it is {state}, and too late to {action} it")
    write, event = _CONTROLS[action]
    write(db, name, reason)
    if live := rows.open_round(db, name):
        rows.update_round(db, name, rounds.step(live, event, now_us))


def _pause(db: Connection, name: str, reason: str) -> None:
    db.execute("UPDATE runs SET decision = 'paused', detail = ? WHERE name = ?", (reason, name))


def _resume(db: Connection, name: str, reason: str) -> None:
    db.execute("UPDATE runs SET decision = '', detail = ? WHERE name = ?", (reason, name))


def _stop(db: Connection, name: str, reason: str) -> None:
    rows.end_run(db, name, "done", reason)
    db.execute("UPDATE runs SET decision = 'stopped' WHERE name = ?", (name,))


_CONTROLS: dict[Control, tuple[Callable[[Connection, str, str], None], rounds.Event]] = {
    "pause": (_pause, rounds.Pause()),
    "resume": (_resume, rounds.Resume()),
    "stop": (_stop, rounds.Stop()),
}


def refuse(db: Connection, name: str, reason: Reason) -> None:
    if db.execute("SELECT 1 FROM runs WHERE name = ?", (name,)).fetchone():
        db.execute(
            "INSERT INTO refusals (run, reason, count) VALUES (?, ?, 1)"
            " ON CONFLICT (run, reason) DO UPDATE SET count = refusals.count + 1",
            (name, reason.value),
        )


def rounds_by_state(db: Connection) -> dict[str, int]:
    return dict(db.execute("SELECT state, COUNT(*) FROM rounds GROUP BY state").fetchall())


def sealed(db: Connection) -> list[tuple[str, Round]]:
    """Those whose base is published: buffers become releases in their order. Runs that this program cannot read are for
    newer replicas to close."""
    columns = ", ".join(f"rounds.{name}" for name in rows.ROUND_COLUMNS)
    found = db.execute(
        f"SELECT rounds.run, {columns} FROM rounds JOIN releases"  # constants
        " ON releases.run = rounds.run AND releases.version = rounds.base_version"
        " JOIN runs ON runs.name = rounds.run WHERE rounds.state = 'sealed' AND runs.edition <= ?",
        (run_spec.EDITION,),
    ).fetchall()
    return [(row[0], Round(*row[1:])) for row in found]


def tick(db: Connection, now_us: int) -> list[tuple[str, Round]]:
    due = db.execute(
        "SELECT run FROM rounds JOIN runs ON runs.name = rounds.run AND runs.edition <= ?"
        " WHERE rounds.state = 'open' AND deadline_us <= COALESCE(paused_us, ?)",
        (run_spec.EDITION, now_us),
    ).fetchall()
    return [(name, _expired(db, name, now_us)) for (name,) in due]


def _expired(db: Connection, name: str, now_us: int) -> Round:
    live = rows.open_round(db, name)
    assert live is not None, "selected in this transaction"
    moved = rounds.step(live, rounds.Tick(), now_us)
    move(db, name, moved, now_us)
    return moved


def publish(db: Connection, name: str, done: Round, release: ReleaseManifest, now_us: int) -> bool:
    if not _is_next(db, name, done):
        return False
    published = rounds.step(done, rounds.Publish(), now_us)
    if rows.update_round(db, name, published) != 1:
        return False
    rows.insert_release(db, release, published.attempt, now_us)
    if rows.run_state(db, name) not in ENDED:
        _open(db, name, rounds.after(rows.read_run(db, name).spec, published, now_us), now_us)
    return True


def _is_next(db: Connection, name: str, done: Round) -> bool:
    """Whether a sealed round is still as it was, and its base the newest release."""
    same = rows.read_round(db, name, done.number, done.attempt) == done
    return same and rows.newest_version(db, name) == done.base_version


def fail(db: Connection, name: str, done: Round, detail: str, now_us: int) -> bool:
    if not _is_next(db, name, done):
        return False
    rows.update_round(db, name, rounds.step(done, rounds.Fail(), now_us))
    if live := rows.open_round(db, name):
        rows.update_round(db, name, rounds.step(live, rounds.Stop(), now_us))
    if rows.run_state(db, name) not in ENDED:
        rows.end_run(db, name, "failed", detail)
    return True


def move(db: Connection, name: str, moved: Round, now_us: int) -> None:
    """Write a round down as it is now, and what follows from that."""
    rows.update_round(db, name, moved)
    match moved.state:
        case "published":  # an evaluation has nothing to combine: the run ends here
            rows.end_run(db, name, "done", "")
        case "sealed":
            _open(db, name, rounds.next_buffer(rows.read_run(db, name).spec, moved), now_us)
        case "abandoned":
            again = rounds.retry(rows.read_run(db, name).spec, moved)
            _open(db, name, again, now_us)
            if again is None:
                rows.end_run(db, name, "failed", f"round {moved.number} missed its minimum {moved.attempt} times")


def _open(db: Connection, name: str, fresh: Round | None, now_us: int) -> None:
    """Open what follows, if anything does, as the person left the run: paused or not."""
    if fresh is not None:
        paused = rows.run_state(db, name) == "paused"
        rows.insert_round(db, name, rounds.step(fresh, rounds.Pause(), now_us) if paused else fresh)
