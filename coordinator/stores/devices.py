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
_COLUMNS = "name, owner, key_digest, state, enrolled_us, ends_us, alarm"
Alarm = Literal["second_use", "two_addresses"]
"""Why somebody should look at a device: its invitation was brought again, for which it is frozen, or its certificate called
from two addresses at once."""


@dataclasses.dataclass(frozen=True)
class Device:
    """An enrolled device. `key_digest` is the SHA-256 of its public key; times in store-clock µs; no `alarm`: all is well."""

    name: str
    owner: str
    key_digest: str
    state: Literal["active", "revoked"]
    enrolled_us: int
    ends_us: int
    alarm: Alarm | None = None

    @property
    def standing(self) -> Literal["active", "frozen", "revoked"]:
        """A frozen one may do nothing until an administrator has looked."""
        return "frozen" if self.state == "active" and self.alarm == "second_use" else self.state

    def check(self) -> None:
        """REVOKED, FROZEN."""
        if self.standing == "revoked":
            raise Refused(Reason.REVOKED, f"device {self.name} was revoked")
        if self.standing == "frozen":
            raise Refused(
                Reason.FROZEN,
                f"device {self.name} is frozen: somebody else brought its invitation, too; whoever administers the"
                " coordinator has to look at it",
            )


@dataclasses.dataclass(frozen=True)
class SecondUse:
    """An invitation was brought again; `first` is the device that used it, now frozen."""

    first: str


def invite(db: Connection, token_hash: str, owner: str, quota: int | None, lifetime_us: int, now_us: int) -> int:
    """Keep a token's hash; when it expires. A given quota holds for the owner from now on."""
    db.execute("INSERT INTO owners (name, quota) VALUES (?, ?) ON CONFLICT (name) DO NOTHING", (owner, FIRST_QUOTA))
    if quota is not None:
        db.execute("UPDATE owners SET quota = ? WHERE name = ?", (quota, owner))
    expires_us = now_us + lifetime_us
    db.execute(
        "INSERT INTO enrolment_tokens (hash, owner, expires_us) VALUES (?, ?, ?) ON CONFLICT (hash) DO NOTHING",
        (token_hash, owner, expires_us),
    )
    return expires_us


def enroll(
    db: Connection, token_hash: str, name: str, key_digest: str, lifetime_us: int, now_us: int
) -> Device | SecondUse:
    """Use a token up for a device. The same device with the same key may repeat it: its answer may have been lost. Whoever
    else brings it freezes that device: whom it was meant for only a person can say.

    BAD_TOKEN (unknown or expired), NAME_TAKEN (another key or owner has the name), REVOKED, FROZEN, QUOTA.
    """
    if (first := _user_before(db, token_hash, name, key_digest, now_us)) is not None:
        db.execute("UPDATE devices SET alarm = 'second_use' WHERE name = ?", (first,))
        return SecondUse(first)
    owner = _use(db, token_hash, name, now_us)
    known = find(db, name)
    if known is not None:
        known.check()
        if (known.owner, known.key_digest) != (owner, key_digest):
            raise Refused(Reason.NAME_TAKEN, f"another device is enrolled as {name}; choose another --name")
    _check_quota(db, owner, name, now_us)
    enrolled_us = now_us if known is None else known.enrolled_us
    device = Device(name, owner, key_digest, "active", enrolled_us, now_us + lifetime_us)
    _write(db, device)
    return device


def _use(db: Connection, token_hash: str, name: str, now_us: int) -> str:
    """The owner that a token speaks for."""
    row = db.execute("SELECT owner, expires_us FROM enrolment_tokens WHERE hash = ?", (token_hash,)).fetchone()
    if row is None or row[1] <= now_us:
        raise Refused(Reason.BAD_TOKEN, "the invitation is unknown or expired; ask for a new one")
    db.execute("UPDATE enrolment_tokens SET used_by = ? WHERE hash = ?", (name, token_hash))
    return str(row[0])


def _user_before(db: Connection, token_hash: str, name: str, key_digest: str, now_us: int) -> str | None:
    """The device that has used a living token, if it is another than the one that brings it now."""
    row = db.execute(
        "SELECT devices.name, devices.key_digest FROM enrolment_tokens JOIN devices ON devices.name = used_by"
        " WHERE hash = ? AND expires_us > ?",
        (token_hash, now_us),
    ).fetchone()
    return None if row is None or tuple(row) == (name, key_digest) else str(row[0])


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
        f"INSERT INTO devices ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)"  # constants
        " ON CONFLICT (name) DO UPDATE SET ends_us = excluded.ends_us",
        dataclasses.astuple(device),
    )


def renew(db: Connection, name: str, lifetime_us: int, now_us: int) -> Device:
    """Note that a device gets a new certificate. REVOKED, FROZEN, UNKNOWN_DEVICE."""
    known = known_device(db, name)
    known.check()
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


def flag(db: Connection, name: str, alarm: Alarm) -> bool:
    """Say that somebody should look at a device; whether that is news."""
    query = "UPDATE devices SET alarm = ? WHERE name = ? AND state = 'active' AND alarm IS NULL"
    return db.execute(query, (alarm, name)).rowcount == 1


def thaw(db: Connection, name: str) -> Device:
    """Somebody has looked: the alarm is over, and a frozen device goes on. Idempotent. UNKNOWN_DEVICE."""
    device = known_device(db, name)
    db.execute("UPDATE devices SET alarm = NULL WHERE name = ?", (name,))
    return dataclasses.replace(device, alarm=None)


def check_standing(db: Connection, name: str) -> None:
    """What every transaction of a device begins with: nothing it does lands after its revocation, or while it is frozen."""
    if (device := find(db, name)) is not None:
        device.check()


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
    db.execute(
        "INSERT INTO release_signatures (release, signature) VALUES (?, ?) ON CONFLICT (release) DO NOTHING",
        (release, signature),
    )


def signature(db: Connection, release: str) -> str | None:
    """A release's signature by its digest, None for an unsigned one."""
    row = db.execute("SELECT signature FROM release_signatures WHERE release = ?", (release,)).fetchone()
    return None if row is None else str(row[0])
