"""What a run's rows say of it: the RunStatus that people and scripts see."""

from __future__ import annotations

from coordinator.rounds import Round
from coordinator.stores import rows
from coordinator.stores.connection import Connection
from wire.messages import Contribution, ReleaseStatus, RunStatus


def run_status(db: Connection, name: str) -> RunStatus:
    """Raises Refused(UNKNOWN_RUN)."""
    run = rows.read_run(db, name)
    shown = _last_round(db, name)
    (detail,) = db.execute("SELECT detail FROM runs WHERE name = ?", (name,)).fetchone()
    refused = dict(db.execute("SELECT reason, count FROM refusals WHERE run = ?", (name,)).fetchall())
    return RunStatus(
        name=name,
        state=run.state,  # type: ignore[arg-type]  # the column's CHECK allows only these
        round=shown.number,
        rounds=run.spec.rounds,
        attempt=shown.attempt,
        kind=shown.kind,
        goal=shown.goal,
        minimum=shown.minimum,
        offered=shown.offered,
        accepted=shown.accepted,
        deadline_at=(shown.deadline_us or 0) / 1e6,
        parameters=run.layout.size,
        spec_digest=run.spec.digest,
        base_digest=run.spec.base.digest,
        refused=refused,
        releases=tuple(_releases(db, name)),
        detail=detail,
    )


def _last_round(db: Connection, name: str) -> Round:
    """The newest: of a run that goes on, the one that takes updates."""
    number, attempt = db.execute(
        "SELECT number, attempt FROM rounds WHERE run = ? ORDER BY number DESC, attempt DESC LIMIT 1", (name,)
    ).fetchone()
    return rows.read_round(db, name, number, attempt)


def _releases(db: Connection, name: str) -> list[ReleaseStatus]:
    rows = db.execute(
        "SELECT version, digest, attempt, published_us FROM releases WHERE run = ? ORDER BY version", (name,)
    ).fetchall()
    return [_release(db, name, *row) for row in rows]


def _release(db: Connection, name: str, version: int, digest: str, attempt: int, published_us: int) -> ReleaseStatus:
    made_from = rows.contributions(db, name, version, attempt)
    measured = _measurements(db, name, digest)
    loss, tokens = _mean([(c.metrics.loss_before, c.metrics.held_out_tokens) for c in measured])
    return ReleaseStatus(
        version=version,
        digest=digest,
        contributions=len(made_from),
        published_at=published_us / 1e6,
        held_out_loss=loss,
        held_out_tokens=tokens,
        local_loss=_mean([(c.metrics.loss_after, c.metrics.held_out_tokens) for c in made_from])[0],
        train_loss=_mean([(c.metrics.train_loss, c.metrics.train_tokens) for c in made_from])[0],
        bytes_up=sum(c.size for c in made_from),
        bytes_down=sum(c.metrics.bytes_down for c in made_from),
    )


def _measurements(db: Connection, name: str, release_digest: str) -> list[Contribution]:
    """Each device's first measurement of a release, whatever became of the round it was made for."""
    by_device: dict[str, Contribution] = {}
    for contribution in rows.measured(db, name, release_digest):
        by_device.setdefault(contribution.device, contribution)
    return list(by_device.values())


def _mean(measured: list[tuple[float | None, int]]) -> tuple[float | None, int]:
    """The mean loss by tokens, and the tokens; (None, 0) where nothing was measured."""
    known = [(loss, tokens) for loss, tokens in measured if loss is not None and tokens > 0]
    tokens = sum(n for _, n in known)
    return (sum(loss * n for loss, n in known) / tokens, tokens) if tokens else (None, 0)
