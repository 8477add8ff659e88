"""Devices, their owners and enrolment tokens, and signatures: what each transaction does, over one open connection.

As in `runs.py`, the caller opens and commits; raising undoes everything.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from coordinator.rounds import Round
from coordinator.stores.connection import Connection
from wire.errors import Reason, Refused

FIRST_QUOTA = 16
"""Devices that an owner may have where nobody said how many."""
_COLUMNS = "name, owner, key_digest, state, enrolled_us, ends_us"


@dataclasses.dataclass(frozen=True)
class Device:
    """An enrolled device. `key_digest` is the SHA-256 of its public key; times in store-clock µs."""

    name: str
    owner: str
    key_digest: str
    state: Literal["active", "revoked"]
    enrolled_us: int
    ends_us: int


def invite(db: Connection, token_hash: str, owner: str, quota: int | None, lifetime_us: int, now_us: int) -> int:
    """Keep a token's hash; when it expires. A given quota holds for the owner from now on."""
    db.execute("INSERT INTO owners VALUES (?, ?) ON CONFLICT (name) DO NOTHING", (owner, FIRST_QUOTA))
    if quota is not None:
        db.execute("UPDATE owners SET quota = ? WHERE name = ?", (quota, owner))
    expires_us = now_us + lifetime_us
    db.execute(
        "INSERT INTO enrolment_tokens VALUES (?, ?, ?, NULL) ON CONFLICT (hash) DO NOTHING",
        (token_hash, owner, expires_us),
    )
    return expires_us


def enroll(db: Connection, token_hash: str, name: str, key_digest: str, lifetime_us: int, now_us: int) -> Device:
    """Use a token up for a device. The same device with the same key may repeat it: its answer may have been lost.

    BAD_TOKEN (unknown, expired or used), NAME_TAKEN (another key or owner has the name), REVOKED, QUOTA.
    """
    owner = _use(db, token_hash, name, now_us)
    known = find(db, name)
    if known is not None:
        if known.state == "revoked":
            raise Refused(Reason.REVOKED, f"device {name} was revoked; enrol under another --name")
        if (known.owner, known.key_digest) != (owner, key_digest):
            raise Refused(Reason.NAME_TAKEN, f"another device is enrolled as {name}; choose another --name")
    _check_quota(db, owner, name, now_us)
    enrolled_us = now_us if known is None else known.enrolled_us
    device = Device(name, owner, key_digest, "active", enrolled_us, now_us + lifetime_us)
    _write(db, device)
    return device


def _use(db: Connection, token_hash: str, name: str, now_us: int) -> str:
    """The owner that a token speaks for. Of two who bring it at once, one finds it unused."""
    row = db.execute("SELECT owner, expires_us, used_by FROM enrolment_tokens WHERE hash = ?", (token_hash,)).fetchone()
    if row is None or row[1] <= now_us:
        raise Refused(Reason.BAD_TOKEN, "the invitation is unknown or expired; ask for a new one")
    changed = db.execute(
        "UPDATE enrolment_tokens SET used_by = ? WHERE hash = ? AND (used_by IS NULL OR used_by = ?)",
        (name, token_hash, name),
    ).rowcount
    if not changed:
        raise Refused(Reason.BAD_TOKEN, "the invitation was used already; ask for a new one")
    return str(row[0])


def _check_quota(db: Connection, owner: str, name: str, now_us: int) -> None:
    db.execute(
        "UPDATE owners SET quota = quota WHERE name = ?", (owner,)
    )  # two devices of one owner are counted in turn
    (quota,) = db.execute("SELECT quota FROM owners WHERE name = ?", (owner,)).fetchone()
    (others,) = db.execute(
        "SELECT COUNT(*) FROM devices WHERE owner = ? AND state = 'active' AND ends_us > ? AND name <> ?",
        (owner, now_us, name),
    ).fetchone()
    if others >= quota:
        raise Refused(
            Reason.QUOTA,
            f"owner {owner} has its {quota} devices; `edgetune coordinator invite --owner {owner} --quota N` allows more",
        )


def _write(db: Connection, device: Device) -> None:
    db.execute(
        f"INSERT INTO devices ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"  # constants
        " ON CONFLICT (name) DO UPDATE SET ends_us = excluded.ends_us",
        dataclasses.astuple(device),
    )


def renew(db: Connection, name: str, lifetime_us: int, now_us: int) -> Device:
    """Note that a device gets a new certificate. REVOKED, UNKNOWN_DEVICE."""
    known = known_device(db, name)
    if known.state == "revoked":
        raise Refused(Reason.REVOKED, f"device {name} was revoked")
    renewed = dataclasses.replace(known, ends_us=now_us + lifetime_us)
    _write(db, renewed)
    return renewed


def find(db: Connection, name: str) -> Device | None:
    row = db.execute(f"SELECT {_COLUMNS} FROM devices WHERE name = ?", (name,)).fetchone()  # constants
    return None if row is None else Device(*row)


def known_device(db: Connection, name: str) -> Device:
    device = find(db, name)
    if device is None:
        raise Refused(Reason.UNKNOWN_DEVICE, f"no device named {name!r}; `edgetune coordinator devices` lists them")
    return device


def every(db: Connection) -> list[Device]:
    return [Device(*row) for row in db.execute(f"SELECT {_COLUMNS} FROM devices ORDER BY name").fetchall()]  # constants


def mark_revoked(db: Connection, name: str) -> Device:
    """Idempotent. UNKNOWN_DEVICE."""
    device = known_device(db, name)
    db.execute("UPDATE devices SET state = 'revoked' WHERE name = ?", (name,))
    return dataclasses.replace(device, state="revoked")


def check_not_revoked(db: Connection, name: str) -> None:
    """What every transaction of a device begins with: nothing it does lands after its revocation."""
    device = find(db, name)
    if device is not None and device.state == "revoked":
        raise Refused(Reason.REVOKED, f"device {name} was revoked")


def seats_of_others(db: Connection, run: str, live: Round, device: str) -> int:
    """How many places of an open round the other devices of the owner of `device` hold."""
    if live.max_staleness is None:
        holds = _HOLDS_A_PLACE
        values: tuple[str | int, ...] = (run, live.number, live.attempt)
    else:
        holds = _MAY_COUNT_IN_A_BUFFER
        values = (run, live.number, run, live.base_version - live.max_staleness)
    (held,) = db.execute(
        "SELECT COUNT(*) FROM devices WHERE name <> ? AND owner = (SELECT owner FROM devices WHERE name = ?)"
        f" AND ({holds})",  # constants
        (device, device, *values),
    ).fetchone()
    return int(held)


_HOLDS_A_PLACE = """
EXISTS (SELECT 1 FROM assignments a WHERE a.device = devices.name AND a.run = ? AND a.number = ? AND a.attempt = ?
        AND a.state IN ('offered', 'accepted'))
"""
_MAY_COUNT_IN_A_BUFFER = """
EXISTS (SELECT 1 FROM contributions c WHERE c.device = devices.name AND c.run = ? AND c.landed = ?)
OR EXISTS (SELECT 1 FROM assignments a WHERE a.device = devices.name AND a.run = ? AND a.state = 'offered' AND a.version >= ?)
"""
"""A task counts where its update lands, which may be in any later buffer: those under way hold their places in all."""


def keep_signature(db: Connection, release: str, signature: str) -> None:
    db.execute("INSERT INTO release_signatures VALUES (?, ?) ON CONFLICT (release) DO NOTHING", (release, signature))


def signature(db: Connection, release: str) -> str | None:
    """A release's signature by its digest, None for an unsigned one."""
    row = db.execute("SELECT signature FROM release_signatures WHERE release = ?", (release,)).fetchone()
    return None if row is None else str(row[0])
