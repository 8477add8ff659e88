"""What a sweep takes away: rows that are there before it deletes a blob, so that no row names what is gone.

A request puts its blob before the row that names it, and may lie between the two for longer than any grace: its process was
suspended. As in `runs.py`, the caller opens and commits; raising undoes everything.
"""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.stores import rows, uploads
from coordinator.stores.connection import Connection
from wire.contract import RETRY_AFTER_S
from wire.errors import Reason, Refused

KEPT_US = 86_400_000_000
"""A day. A sweep that has not ended by then is taken for dead, and a request that has not, for too late."""


def named(db: Connection) -> set[str]:
    """Every blob that a contribution, a release or an upload names."""
    return rows.named_blobs(db) | uploads.named_parts(db)


def wanted(db: Connection) -> set[str]:
    """All of `named`, and what grows to be so."""
    return named(db) | uploads.names(db)


def mark(db: Connection, old: set[str], sweep: str, now_us: int) -> set[str]:
    """Those of `old` that no row names, and from now on none may, until `gone`. What another sweep is deleting is left to it."""
    db.execute("DELETE FROM deleted_blobs WHERE COALESCE(gone_us, marked_us) < ?", (now_us - KEPT_US,))
    taken = db.execute("SELECT digest FROM deleted_blobs WHERE gone_us IS NULL AND sweep <> ?", (sweep,)).fetchall()
    unnamed = old - wanted(db) - {digest for (digest,) in taken}
    for digest in sorted(unnamed):
        db.execute(
            "INSERT INTO deleted_blobs (digest, sweep, marked_us) VALUES (?, ?, ?)"
            " ON CONFLICT (digest) DO UPDATE SET sweep = excluded.sweep, marked_us = excluded.marked_us, gone_us = NULL",
            (digest, sweep, now_us),
        )
    return unnamed


def gone(db: Connection, sweep: str, now_us: int) -> None:
    """All that a sweep has marked is deleted: what is put from now on stays."""
    db.execute("UPDATE deleted_blobs SET gone_us = ? WHERE sweep = ? AND gone_us IS NULL", (now_us, sweep))


def check(db: Connection, digests: Iterable[str], since_us: int | None, now_us: int) -> None:
    """Whether blobs that were looked at or put after `since_us`, by the store's clock, may be named. None: they are none's.

    BUSY if a sweep is deleting one or has done so since, or nobody can know: whoever puts them again may.
    """
    if since_us is None:
        return
    if now_us - since_us > KEPT_US:
        raise Refused(Reason.BUSY, "this took longer than a day: begin again", RETRY_AFTER_S)
    for digest in digests:
        query = "SELECT 1 FROM deleted_blobs WHERE digest = ? AND (gone_us IS NULL OR gone_us >= ?)"
        if db.execute(query, (digest, since_us)).fetchone():
            raise Refused(Reason.BUSY, f"blob {digest[:12]}… was old and is swept away: send it again", RETRY_AFTER_S)
