"""Devices and administrators with identities: who is invited, enrolled, renewed and revoked, and the signatures of releases.

What is remembered is in the ledger (`stores/devices.py`), what is signed comes from the authority.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable
from pathlib import Path

from coordinator.authority import Authority
from coordinator.events import Events, unheard
from coordinator.meter import Meter
from coordinator.stores import Ledger, administrators, devices, updates
from coordinator.stores.administrators import Administrator
from coordinator.stores.connection import Connection
from coordinator.stores.devices import Alarm, Device, SecondUse
from wire import addresses, certificates
from wire.certificates import Certificate
from wire.errors import PayloadError, Reason, Refused
from wire.identity import (
    DAY_S,
    MAX_INVITATION_S,
    MAX_LIFETIME_S,
    TOKEN_BYTES,
    Invitation,
    Role,
    is_loopback,
    token_hash,
)
from wire.run_spec import NAME

STANDING_S = 1.0
"""How long a caller's standing may be remembered."""
ADMINISTRATOR_S = 90 * DAY_S
"""The life of an administrator's certificate, unless it is the first one's, which `init` made."""
USED = "the invitation was used already; ask for a new one"


@dataclasses.dataclass(frozen=True)
class Doors:
    """Where a coordinator listens, HOST:PORT each; `enrolment` is empty without identities."""

    devices: str = ""
    enrolment: str = ""


@dataclasses.dataclass(frozen=True)
class Trust:
    """What each process of a coordinator opens its identities from: the folder that `init` made, and how long a device's
    certificate lives."""

    folder: Path
    lifetime_s: float = MAX_LIFETIME_S

    def over(self, ledger: Ledger, meter: Meter, events: Events) -> Identities:
        """Raises IdentityError where a file is missing or damaged."""
        return Identities(ledger, Authority(self.folder), self.lifetime_s, meter, events)


class Identities:
    """The identities of one coordinator. `lifetime_s` is how long a device's certificate lives."""

    def __init__(
        self,
        ledger: Ledger,
        authority: Authority,
        lifetime_s: float = MAX_LIFETIME_S,
        meter: Meter | None = None,
        events: Events = unheard,
    ) -> None:
        self.authority, self.doors = authority, Doors()
        self._ledger, self._lifetime_s = ledger, lifetime_s
        self._meter, self._events = meter or Meter(), events
        self._standing: dict[tuple[Role, str], tuple[float, Device | Administrator | None]] = {}

    async def invite(self, owner: str, quota: int | None, lifetime_s: float) -> tuple[Invitation, float]:
        """A new invitation, and when it expires in Unix seconds. Raises PayloadError for what cannot be."""
        if not NAME.fullmatch(owner):
            raise PayloadError(Reason.BAD_REQUEST, "an owner's name is 1 to 64 of a-z 0-9 . _ -")
        if quota is not None and quota < 1:
            raise PayloadError(Reason.BAD_REQUEST, "a quota is at least 1")
        made = await self._invited(lifetime_s, lambda db, *rest: devices.invite(db, rest[0], owner, quota, *rest[1:]))
        self._events("invited", owner=owner)
        return made

    async def invite_administrator(self, name: str, lifetime_s: float) -> tuple[Invitation, float]:
        """As `invite`, for a further administrator."""
        if not NAME.fullmatch(name):
            raise PayloadError(Reason.BAD_REQUEST, "an administrator's name is 1 to 64 of a-z 0-9 . _ -")
        made = await self._invited(lifetime_s, lambda db, *rest: administrators.invite(db, rest[0], name, *rest[1:]))
        self._events("administrator", administrator=name, action="invited")
        return made

    async def _invited(
        self, lifetime_s: float, work: Callable[[Connection, str, int, int], int]
    ) -> tuple[Invitation, float]:
        """`work` keeps the hash of a fresh token for so many µs, and says when that will be."""
        if not 0 < lifetime_s <= MAX_INVITATION_S:
            raise PayloadError(Reason.BAD_REQUEST, "an invitation lives for at most 24 hours")
        token, lifetime_us = secrets.token_bytes(TOKEN_BYTES), int(lifetime_s * 1e6)
        expires_us = await self._ledger.transact(lambda db, now: work(db, token_hash(token), lifetime_us, now))
        authority = certificates.fingerprint(self.authority.certificate)
        return Invitation(self._enrolment(), authority, token), expires_us / 1e6

    def _enrolment(self) -> str:
        """Where devices enrol: under the first name that the coordinator was given, unless it listens here alone."""
        bound = self.doors.enrolment
        if is_loopback(bound):
            return bound
        return addresses.joined(self.authority.hosts[0], addresses.parse(bound)[1])

    async def enroll(self, token: bytes, name: str, request: str) -> str:
        """A certificate for a token and a signing request, PEM."""
        if not NAME.fullmatch(name):
            raise PayloadError(Reason.BAD_REQUEST, "a device name is 1 to 64 of a-z 0-9 . _ -")
        public = certificates.requested(request)
        hash_, key = token_hash(token), certificates.key_digest(public)
        if await self._ledger.look(lambda db, _: administrators.is_invited(db, hash_)):
            await self._enroll_administrator(hash_, name, key)
            return self.authority.issue("admin", name, public, ADMINISTRATOR_S)
        await self._enroll_device(hash_, name, key)
        return self.authority.issue("device", name, public, self._lifetime_s)

    async def _enroll_device(self, hash_: str, name: str, key: str) -> None:
        """Whoever brings a used invitation freezes the device that used it, and takes what it gave out of open rounds."""

        def work(db: Connection, now_us: int) -> Device | SecondUse:
            found = devices.enroll(db, hash_, name, key, int(self._lifetime_s * 1e6), now_us)
            if isinstance(found, SecondUse):
                updates.withdraw(db, found.first, now_us)
            return found

        found = await self._ledger.transact(work)
        if isinstance(found, SecondUse):
            self._standing.pop(("device", found.first), None)
            self._alarm(found.first, "second_use")
            raise Refused(Reason.BAD_TOKEN, USED)
        self._events("enrolled", device=name)

    async def _enroll_administrator(self, hash_: str, name: str, key: str) -> None:
        lifetime_us = int(ADMINISTRATOR_S * 1e6)
        found = await self._ledger.transact(
            lambda db, now: administrators.enroll(db, hash_, name, key, lifetime_us, now)
        )
        self._events("administrator", administrator=name, action="enrolled" if found else "revoked")
        if found is None:
            self._standing.pop(("admin", name), None)
            self._meter.alarms["second_use"] += 1
            raise Refused(Reason.BAD_TOKEN, USED)

    def _alarm(self, device: str, alarm: Alarm) -> None:
        self._meter.alarms[alarm] += 1
        self._events("alarm", device=device, alarm=alarm)

    async def flag(self, caller: Certificate, alarm: Alarm) -> None:
        """Say once that somebody should look at a device."""
        known = await self._known(caller)
        if isinstance(known, Device) and known.alarm is None:
            self._standing.pop((caller.role, caller.name), None)
            if await self._ledger.transact(lambda db, now: devices.flag(db, caller.name, alarm)):
                self._alarm(caller.name, alarm)

    async def renew(self, pem: str) -> str:
        """The next certificate for the name and key of `pem`, which its holder has proved to have."""
        caller, public = certificates.read(pem), certificates.public_key(pem)
        if caller.role == "admin":
            life_us = int(ADMINISTRATOR_S * 1e6)
            await self._ledger.transact(lambda db, now: administrators.renew(db, caller.name, caller.key, life_us, now))
            self._events("administrator", administrator=caller.name, action="renewed")
            return self.authority.issue("admin", caller.name, public, ADMINISTRATOR_S)
        lifetime_us = int(self._lifetime_s * 1e6)
        await self._ledger.transact(lambda db, now: devices.renew(db, caller.name, lifetime_us, now))
        self._events("renewed", device=caller.name)
        return self.authority.issue("device", caller.name, public, self._lifetime_s)

    async def revoke(self, name: str) -> Device:
        """End a device's part, and take what it gave to open rounds out of them, in one transaction."""

        def work(db: Connection, now_us: int) -> Device:
            device = devices.mark_revoked(db, name)
            updates.withdraw(db, name, now_us)
            return device

        self._standing.pop(("device", name), None)
        revoked = await self._ledger.transact(work)
        self._events("revoked", device=name)
        return revoked

    async def thaw(self, name: str) -> Device:
        """An administrator has looked at a device: its alarm is over."""
        self._standing.pop(("device", name), None)
        thawed = await self._ledger.transact(lambda db, now: devices.thaw(db, name))
        self._events("thawed", device=name)
        return thawed

    async def revoke_administrator(self, name: str) -> Administrator:
        """End an administrator's calls."""
        self._standing.pop(("admin", name), None)
        revoked = await self._ledger.transact(lambda db, now: administrators.revoke(db, name, now))
        self._events("administrator", administrator=name, action="revoked")
        return revoked

    async def devices(self) -> list[Device]:
        return await self._ledger.look(lambda db, _: devices.every(db))

    async def administrators(self) -> list[Administrator]:
        return await self._ledger.look(lambda db, _: administrators.every(db))

    async def check(self, caller: Certificate) -> None:
        """Whether a caller whose certificate this authority issued may call now. CERTIFICATE_EXPIRED, NOT_ENROLLED, REVOKED,
        FROZEN."""
        if time.time() >= caller.not_after:
            raise Refused(Reason.CERTIFICATE_EXPIRED, f"the certificate of {caller.name} has expired")
        known = await self._known(caller)
        if caller.role == "admin":
            assert not isinstance(known, Device), "looked up by role"
            administrators.check(known, caller.name, caller.key)
        elif known is None or known.key_digest != caller.key:
            raise Refused(Reason.NOT_ENROLLED, f"no device with this key is enrolled as {caller.name}")
        elif isinstance(known, Device):
            known.check()

    async def _known(self, caller: Certificate) -> Device | Administrator | None:
        """A caller as the ledger has it, at most `STANDING_S` ago."""
        who = (caller.role, caller.name)
        looked_up, known = self._standing.get(who, (0.0, None))
        if time.monotonic() - looked_up > STANDING_S or known is None:
            find = administrators.find if caller.role == "admin" else devices.find
            known = await self._ledger.look(lambda db, _: find(db, caller.name))
            self._standing[who] = (time.monotonic(), known)
        return known

    async def sign(self, release: str) -> None:
        """Sign a release's digest, before the ledger names the release: what is published is signed."""
        signature = self.authority.sign(release)
        await self._ledger.transact(lambda db, now: devices.keep_signature(db, release, signature))

    async def signature(self, release: str) -> str:
        """The signature of a release, empty for one that was published without: it is not made good afterwards, so that
        rows which somebody else wrote never become signed releases."""
        return await self._ledger.look(lambda db, _: devices.signature(db, release)) or ""
