"""Administrators beside the first: invited, enrolled, renewed and revoked, over one open connection.

As in `runs.py`, the caller opens and commits; raising undoes everything. The first one is made with the authority, before
there is a ledger: without a row it may call, and a row is written when it is renewed or revoked.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from coordinator.stores.connection import Connection
from wire.errors import Reason, Refused

FIRST = "admin"
_COLUMNS = "name, key_digest, state, enrolled_us, ends_us"


@dataclasses.dataclass(frozen=True)
class Administrator:
    """`key_digest` is the SHA-256 of its public key; times in store-clock µs."""

    name: str
    key_digest: str
    state: Literal["active", "revoked"]
    enrolled_us: int
    ends_us: int


def invite(db: Connection, token_hash: str, name: str, lifetime_us: int, now_us: int) -> int:
    """Keep a token's hash; when it expires. NAME_TAKEN."""
    if name == FIRST or find(db, name) is not None:
        raise Refused(Reason.NAME_TAKEN, f"{name} is or was an administrator; choose another name")
    expires_us = now_us + lifetime_us
    db.execute(
        "INSERT INTO administrator_tokens (hash, name, expires_us) VALUES (?, ?, ?) ON CONFLICT (hash) DO NOTHING",
        (token_hash, name, expires_us),
    )
    return expires_us


def is_invited(db: Connection, token_hash: str) -> bool:
    """Whether a token is an administrator's, whatever has become of it."""
    row = db.execute("SELECT 1 FROM administrator_tokens WHERE hash = ?", (token_hash,)).fetchone()
    return row is not None


def enroll(
    db: Connection, token_hash: str, name: str, key_digest: str, lifetime_us: int, now_us: int
) -> Administrator | None:
    """Use a token up. The same key may repeat it: its answer may have been lost. None where another key brings it again:
    whom it was meant for only a person can say, and so the first is revoked.

    BAD_TOKEN (unknown, expired, or for another name), REVOKED.
    """
    invited, expires_us, used_by = db.execute(
        "SELECT name, expires_us, used_by FROM administrator_tokens WHERE hash = ?", (token_hash,)
    ).fetchone()
    if expires_us <= now_us or invited != name:
        raise Refused(Reason.BAD_TOKEN, "the invitation is expired, or for another administrator; ask for a new one")
    if used_by not in (None, key_digest):
        _end(db, name)
        return None
    if (known := find(db, name)) is not None and known.state == "revoked":
        raise Refused(Reason.REVOKED, f"administrator {name} was revoked")
    db.execute("UPDATE administrator_tokens SET used_by = ? WHERE hash = ?", (key_digest, token_hash))
    return _written(db, Administrator(name, key_digest, "active", now_us, now_us + lifetime_us))


def renew(db: Connection, name: str, key_digest: str, lifetime_us: int, now_us: int) -> Administrator:
    """Note that an administrator gets a new certificate. REVOKED, NOT_ENROLLED."""
    check(find(db, name), name, key_digest)
    return _written(db, Administrator(name, key_digest, "active", now_us, now_us + lifetime_us))


def check(known: Administrator | None, name: str, key_digest: str) -> None:
    """Whether the holder of a certificate for `name` may call. NOT_ENROLLED, REVOKED."""
    if known is None and name == FIRST:
        return
    if known is not None and known.state == "revoked":
        raise Refused(Reason.REVOKED, f"administrator {name} was revoked")
    if known is None or known.key_digest != key_digest:
        raise Refused(Reason.NOT_ENROLLED, f"no administrator with this key is enrolled as {name}")


def revoke(db: Connection, name: str, now_us: int) -> Administrator:
    """Idempotent. UNKNOWN_DEVICE where nobody is an administrator by this name."""
    known = find(db, name)
    if known is None and name != FIRST:
        raise Refused(Reason.UNKNOWN_DEVICE, f"no administrator named {name!r}")
    if known is None:
        known = _written(db, Administrator(FIRST, "", "revoked", now_us, now_us))
    _end(db, name)
    return dataclasses.replace(known, state="revoked")


def find(db: Connection, name: str) -> Administrator | None:
    row = db.execute(f"SELECT {_COLUMNS} FROM administrators WHERE name = ?", (name,)).fetchone()  # constants
    return None if row is None else Administrator(*row)


def every(db: Connection) -> list[Administrator]:
    rows = db.execute(f"SELECT {_COLUMNS} FROM administrators ORDER BY name").fetchall()  # constants
    return [Administrator(*row) for row in rows]


def _written(db: Connection, one: Administrator) -> Administrator:
    db.execute(
        f"INSERT INTO administrators ({_COLUMNS}) VALUES (?, ?, ?, ?, ?)"  # constants
        " ON CONFLICT (name) DO UPDATE SET ends_us = excluded.ends_us",
        dataclasses.astuple(one),
    )
    return one


def _end(db: Connection, name: str) -> None:
    db.execute("UPDATE administrators SET state = 'revoked' WHERE name = ?", (name,))
