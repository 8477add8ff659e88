"""Updates under way: what each transaction does to the rows of uploads and their parts, over one open connection.

As in `runs.py`, the caller opens and commits; raising undoes everything.
"""

from __future__ import annotations

import dataclasses

from coordinator.stores import runs, updates
from coordinator.stores.connection import Connection
from wire.errors import Reason, Refused
from wire.messages import Contribution

GROWN = "grown"
"""Stands for the blob of an upload's parts where they lie in one that grows, under the upload's id. It is nothing's digest: a
process that knows only of parts finds no such blob, and has the device begin anew."""
_COLUMNS = "id, device, size, received"
_KEY = "run = ? AND number = ? AND attempt = ? AND device = ? AND digest = ?"


@dataclasses.dataclass(frozen=True)
class Upload:
    """One update under way: `received` of `size` bytes are durable."""

    id: str
    device: str
    size: int
    received: int


def create(
    db: Connection, mine: Contribution, fresh_id: str, most: int, most_bytes: int, keep_us: int, now_us: int
) -> Upload:
    """The upload of a contribution: the one that is there, or a new one of `fresh_id`.

    TOO_MANY_UPLOADS if the device has `most` already, or `most_bytes` with this one; those that have expired do not count.
    BUSY if the contribution has come in since it was checked: begun once more, its parts would be refused as too late.
    """
    if updates.check(db, mine, now_us) is not None:
        raise Refused(Reason.BUSY, "this update has just come in; ask again for its receipt", 0.1)
    known = of(db, mine)
    if known is not None:
        db.execute("UPDATE uploads SET expires_us = ? WHERE id = ?", (now_us + keep_us, known.id))
        return known
    begun = "SELECT count(*), coalesce(sum(size), 0) FROM uploads WHERE device = ? AND expires_us > ?"
    count, declared = db.execute(begun, (mine.device, now_us)).fetchone()
    if count >= most or declared + mine.size > most_bytes:
        raise Refused(Reason.TOO_MANY_UPLOADS, f"{mine.device} has begun {count} uploads of {declared} bytes already")
    values = (fresh_id, *_key(mine), mine.size, 0, now_us + keep_us)
    db.execute(
        "INSERT INTO uploads (id, run, number, attempt, device, digest, size, received, expires_us)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        values,
    )
    return Upload(fresh_id, mine.device, mine.size, 0)


def of(db: Connection, mine: Contribution) -> Upload | None:
    """The upload of a contribution, if there is one. BAD_SIZE if it was declared with another size."""
    row = db.execute(f"SELECT {_COLUMNS} FROM uploads WHERE {_KEY}", _key(mine)).fetchone()  # constants
    if row is not None and row[2] != mine.size:
        raise Refused(Reason.BAD_SIZE, f"this upload was declared with {row[2]} bytes, not {mine.size}")
    return None if row is None else Upload(*row)


def with_parts(db: Connection, mine: Contribution) -> tuple[Upload | None, list[str]]:
    """As `of`, and what its parts lie in. Together: a repeated commit may forget an upload between one look and the next."""
    upload = of(db, mine)
    return upload, [] if upload is None else parts(db, upload.id)


def find(db: Connection, upload: str, device: str, now_us: int) -> Upload:
    """UNKNOWN_UPLOAD if there is none, NOT_ASSIGNED if it is another device's; ROUND_CLOSED or STALE_RELEASE if it comes too
    late to count."""
    row = db.execute(f"SELECT {_COLUMNS} FROM uploads WHERE id = ?", (upload,)).fetchone()  # constants
    if row is None:
        raise Refused(Reason.UNKNOWN_UPLOAD, "no such upload; it may have expired")
    if row[1] != device:
        raise Refused(Reason.NOT_ASSIGNED, f"this upload is not one of {device}")
    _check_open(db, upload, now_us)
    return Upload(*row)


def _check_open(db: Connection, upload: str, now_us: int) -> None:
    for key in db.execute("SELECT run, number, attempt, device FROM uploads WHERE id = ?", (upload,)).fetchall():
        updates.check_open(db, key, now_us)


def append(db: Connection, upload: str, start: int, size: int, digest: str, keep_us: int, now_us: int) -> int:
    """Name a part that is durable, by its blob's digest or GROWN; where the upload ends now. WRONG_OFFSET if it did not end
    at `start`; ROUND_CLOSED or STALE_RELEASE if it comes too late to count."""
    _check_open(db, upload, now_us)
    moved = db.execute(
        "UPDATE uploads SET received = ?, expires_us = ? WHERE id = ? AND received = ?",
        (start + size, now_us + keep_us, upload, start),
    ).rowcount
    if moved != 1:
        raise wrong_offset(db.execute("SELECT received FROM uploads WHERE id = ?", (upload,)).fetchone())
    if start == 0 or digest != GROWN:
        db.execute("INSERT INTO upload_parts (upload, start, digest) VALUES (?, ?, ?)", (upload, start, digest))
    return start + size


def wrong_offset(row: tuple[int] | None) -> Refused:
    """The refusal of a part that does not begin where its upload ends, by what the ledger has of that upload."""
    if row is None:
        return Refused(Reason.UNKNOWN_UPLOAD, "no such upload; it may have expired")
    return Refused(Reason.WRONG_OFFSET, f"the upload ends at {row[0]}", offset=row[0])


def parts(db: Connection, upload: str) -> list[str]:
    """The blob of each part, in order; of all those that have grown together, GROWN once."""
    rows = db.execute("SELECT digest FROM upload_parts WHERE upload = ? ORDER BY start", (upload,)).fetchall()
    return [digest for (digest,) in rows]


def forget(db: Connection, upload: str) -> list[str]:
    """Remove an upload; the blobs that nobody names any more. Idempotent."""
    unnamed = [upload if digest == GROWN else digest for digest in parts(db, upload)] or [upload]
    db.execute("DELETE FROM upload_parts WHERE upload = ?", (upload,))
    db.execute("DELETE FROM uploads WHERE id = ?", (upload,))
    return unnamed


def close(db: Connection, upload: str, reason: Reason) -> list[str]:
    """As `forget`, for an upload that comes too late: its refusal is counted."""
    for (run,) in db.execute("SELECT run FROM uploads WHERE id = ?", (upload,)).fetchall():
        runs.refuse(db, run, reason)
    return forget(db, upload)


def forget_of(db: Connection, mine: Contribution) -> list[str]:
    """As `forget`, by contribution."""
    rows = db.execute(f"SELECT id FROM uploads WHERE {_KEY}", _key(mine)).fetchall()  # constants
    return [digest for (upload,) in rows for digest in forget(db, upload)]


def forget_expired(db: Connection, now_us: int) -> list[str]:
    """Remove what was given up; the blobs that nobody names any more."""
    expired = db.execute("SELECT id FROM uploads WHERE expires_us <= ?", (now_us,)).fetchall()
    return [digest for (upload,) in expired for digest in forget(db, upload)]


def named_parts(db: Connection) -> set[str]:
    """The blobs of all parts that are blobs of their own."""
    named = db.execute("SELECT digest FROM upload_parts WHERE digest <> ?", (GROWN,)).fetchall()
    return {digest for (digest,) in named}


def names(db: Connection) -> set[str]:
    """Every upload, by the name under which its bytes may be growing."""
    return {upload for (upload,) in db.execute("SELECT id FROM uploads").fetchall()}


def _key(mine: Contribution) -> tuple[str, int, int, str, str]:
    return (mine.run, mine.round, mine.attempt, mine.device, mine.digest)
