"""Who this caller is to a coordinator: its certificate, checked, shown and renewed in time; and how a device gets the first."""

from __future__ import annotations

import dataclasses
import hmac
import time
from pathlib import Path

from wire import addresses, certificates
from wire.certificates import Certificate
from wire.errors import IdentityError, PayloadError, Reason
from wire.identity import Card, Invitation, read_card, read_key, write_card, write_key
from wire.messages import ReleaseManifest


class Identity:
    """A folder with a key and a card. Raises IdentityError for one that is damaged."""

    def __init__(self, folder: Path, card: Card, key: str) -> None:
        self._folder, self._key = folder, key
        self._card, self.certificate = card, certificates.read(card.certificate)
        if self.certificate.key != certificates.key_digest(certificates.public_of(key)):
            raise IdentityError(f"{folder}: the key is not that of the certificate; enrol again")

    @classmethod
    def read(cls, folder: Path) -> Identity:
        card, key = read_card(folder), read_key(folder)
        if card is None or key is None:
            raise IdentityError(f"{folder}: no identity here, or half of one; enrol again")
        return cls(folder, card, key)

    @property
    def coordinator(self) -> str:
        """HOST:PORT of the coordinator that this device enrolled with; empty for an administrator."""
        return self._card.coordinator

    def tls(self) -> tuple[bytes, bytes, bytes]:
        """Whom to believe, the own key, the own certificate: PEM."""
        return self._card.authority.encode(), self._key.encode(), self._card.certificate.encode()

    def check_window(self) -> None:
        """Raises IdentityError where the own certificate is not valid now: a handshake would only fail silently."""
        self.certificate.check_window(time.time())

    def is_due(self) -> bool:
        """Whether it is time to renew: half of the certificate's life is over."""
        return time.time() >= self.certificate.renew_at

    def renewed(self, pem: str) -> None:
        """Take and keep the next certificate. Raises PayloadError for one that is not for this very caller."""
        fresh = _certified(pem, self._card.authority, self._key, self.certificate.name)
        self._card = dataclasses.replace(self._card, certificate=pem)
        write_card(self._folder, self._card)
        self.certificate = fresh

    def check_release(self, release: ReleaseManifest, signature: str) -> None:
        """Raises PayloadError for a release that the coordinator enrolled with has not signed."""
        if not signature:
            raise PayloadError(
                Reason.BAD_SIGNATURE,
                f"release {release.version} of {release.run} is not signed; runs that were created before"
                " `edgetune coordinator init` stay unsigned and have to be created anew",
            )
        if not certificates.is_signed(release.digest, signature, self._card.release_key):
            raise PayloadError(
                Reason.BAD_SIGNATURE,
                f"the signature of release {release.version} of {release.run} is not the coordinator's",
            )

    def check_release_key(self, key: str) -> None:
        """Raises PayloadError where a coordinator names another release key than it had at enrolment."""
        if key != self._card.release_key:
            raise PayloadError(Reason.BAD_SIGNATURE, "the coordinator signs with another key than it had at enrolment")


def enroll(invitation: Invitation, folder: Path, name: str) -> Identity:
    """Turn an invitation into an identity in `folder`. The key is made here, kept here, and never sent.

    A key that is there already is used again: an answer that was lost can be asked for anew, and a device whose
    certificate has expired stays the device that it was. Raises Refused, Unreachable, IdentityError.
    """
    from edge_client import enrolment

    authority, answer = enrolment.enrolled(
        invitation, name, lambda pem: _trusted(pem, invitation), lambda: _request(folder)
    )
    key = read_key(folder)
    assert key is not None, "the request was made with it"
    _certified(answer.certificate, authority, key, name)
    address = addresses.joined(addresses.parse(invitation.address)[0], answer.port)
    card = Card(address, authority, answer.certificate, answer.release_key)
    write_card(folder, card)
    return Identity(folder, card, key)


def _trusted(authority: str, invitation: Invitation) -> None:
    """Raises IdentityError for a coordinator that is not the one that invited."""
    if not hmac.compare_digest(certificates.fingerprint(authority), invitation.authority):
        raise IdentityError(
            f"who answers at {invitation.address} is not the coordinator that made this invitation: nothing was sent. Ask for"
            " a new invitation, and if it happens again, somebody may be in between"
        )


def _request(folder: Path) -> str:
    if (key := read_key(folder)) is None:
        write_key(folder, key := certificates.new_key())
    return certificates.request(key)


def _certified(pem: str, authority: str, key: str, name: str) -> Certificate:
    """What a new certificate says, if it is for this key and name and by this authority."""
    certificate = certificates.read(pem)
    own = certificates.key_digest(certificates.public_of(key))
    if (certificate.key, certificate.name) != (own, name) or not certificates.is_issued_by(pem, authority):
        raise PayloadError(
            Reason.BAD_REQUEST, "the coordinator answered with a certificate that is not for this device"
        )
    return certificate
