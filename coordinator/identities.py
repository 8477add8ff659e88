"""Devices with identities: who is invited, enrolled, renewed and revoked, and the signatures of releases.

What is remembered is in the ledger (`stores/devices.py`), what is signed comes from the authority.
"""

from __future__ import annotations

import dataclasses
import secrets
import time
from pathlib import Path

from coordinator.authority import Authority
from coordinator.stores import Ledger, devices, updates
from coordinator.stores.connection import Connection
from coordinator.stores.devices import Device
from wire import certificates
from wire.certificates import Certificate
from wire.errors import PayloadError, Reason, Refused
from wire.identity import MAX_INVITATION_S, MAX_LIFETIME_S, TOKEN_BYTES, Invitation, is_loopback, token_hash
from wire.run_spec import NAME

STANDING_S = 1.0
"""How long a device's standing may be remembered."""


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

    def over(self, ledger: Ledger) -> Identities:
        """Raises IdentityError where a file is missing or damaged."""
        return Identities(ledger, Authority(self.folder), self.lifetime_s)


class Identities:
    """The identities of one coordinator. `lifetime_s` is how long a device's certificate lives."""

    def __init__(self, ledger: Ledger, authority: Authority, lifetime_s: float = MAX_LIFETIME_S) -> None:
        self.authority, self.doors = authority, Doors()
        self._ledger, self._lifetime_s = ledger, lifetime_s
        self._standing: dict[str, tuple[float, Device | None]] = {}

    async def invite(self, owner: str, quota: int | None, lifetime_s: float) -> tuple[Invitation, float]:
        """A new invitation, and when it expires in Unix seconds. Raises PayloadError for what cannot be."""
        if not NAME.fullmatch(owner):
            raise PayloadError(Reason.BAD_REQUEST, "an owner's name is 1 to 64 of a-z 0-9 . _ -")
        if not 0 < lifetime_s <= MAX_INVITATION_S:
            raise PayloadError(Reason.BAD_REQUEST, "an invitation lives for at most 24 hours")
        if quota is not None and quota < 1:
            raise PayloadError(Reason.BAD_REQUEST, "a quota is at least 1")
        token, lifetime_us = secrets.token_bytes(TOKEN_BYTES), int(lifetime_s * 1e6)
        expires_us = await self._ledger.transact(
            lambda db, now: devices.invite(db, token_hash(token), owner, quota, lifetime_us, now)
        )
        return Invitation(
            self._enrolment(), certificates.fingerprint(self.authority.certificate), token
        ), expires_us / 1e6

    def _enrolment(self) -> str:
        """Where devices enrol: under the first name that the coordinator was given, unless it listens here alone."""
        bound = self.doors.enrolment
        if is_loopback(bound):
            return bound
        host, port = self.authority.hosts[0], bound.rpartition(":")[2]
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def enroll(self, token: bytes, name: str, request: str) -> str:
        """A certificate for a token and a signing request, PEM."""
        if not NAME.fullmatch(name):
            raise PayloadError(Reason.BAD_REQUEST, "a device name is 1 to 64 of a-z 0-9 . _ -")
        public = certificates.requested(request)
        key = certificates.key_digest(public)
        lifetime_us = int(self._lifetime_s * 1e6)
        await self._ledger.transact(lambda db, now: devices.enroll(db, token_hash(token), name, key, lifetime_us, now))
        return self.authority.issue(name, public, self._lifetime_s)

    async def renew(self, pem: str) -> str:
        """The next certificate for the name and key of `pem`, which its holder has proved to have."""
        caller = certificates.read(pem)
        lifetime_us = int(self._lifetime_s * 1e6)
        await self._ledger.transact(lambda db, now: devices.renew(db, caller.name, lifetime_us, now))
        return self.authority.issue(caller.name, certificates.public_key(pem), self._lifetime_s)

    async def revoke(self, name: str) -> Device:
        """End a device's part, and take what it gave to open rounds out of them, in one transaction."""

        def work(db: Connection, now_us: int) -> Device:
            device = devices.mark_revoked(db, name)
            updates.withdraw(db, name, now_us)
            return device

        self._standing.pop(name, None)
        return await self._ledger.transact(work)

    async def devices(self) -> list[Device]:
        return await self._ledger.look(lambda db, _: devices.every(db))

    async def check(self, caller: Certificate) -> None:
        """Whether a caller whose certificate this authority issued may call now. CERTIFICATE_EXPIRED, NOT_ENROLLED, REVOKED."""
        if time.time() >= caller.not_after:
            raise Refused(Reason.CERTIFICATE_EXPIRED, f"the certificate of {caller.name} has expired")
        if caller.role == "admin":
            return
        device = await self._device(caller.name)
        if device is None or device.key_digest != caller.key:
            raise Refused(Reason.NOT_ENROLLED, f"no device with this key is enrolled as {caller.name}")
        if device.state == "revoked":
            raise Refused(Reason.REVOKED, f"device {caller.name} was revoked")

    async def _device(self, name: str) -> Device | None:
        """A device as the ledger has it, at most `STANDING_S` ago."""
        looked_up, device = self._standing.get(name, (0.0, None))
        if time.monotonic() - looked_up > STANDING_S or device is None:
            device = await self._ledger.look(lambda db, _: devices.find(db, name))
            self._standing[name] = (time.monotonic(), device)
        return device

    async def sign(self, release: str) -> None:
        """Sign a release's digest, before the ledger names the release: what is published is signed."""
        signature = self.authority.sign(release)
        await self._ledger.transact(lambda db, now: devices.keep_signature(db, release, signature))

    async def signature(self, release: str) -> str:
        """The signature of a release, empty for one that was published without: it is not made good afterwards, so that
        rows which somebody else wrote never become signed releases."""
        return await self._ledger.look(lambda db, _: devices.signature(db, release)) or ""
