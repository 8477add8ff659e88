"""Who is who, as data: the invitation that a person pastes, and the folder in which a caller keeps what it proves itself by.

Nothing here needs a cryptographic library; `wire/certificates.py` does.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import ipaddress
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from wire import addresses, spec
from wire.errors import IdentityError, MachineError, UserError

Role = Literal["device", "admin"]
DAY_S = 86_400.0
MAX_LIFETIME_S = 7 * DAY_S
"""The longest life of a device's certificate."""
MAX_INVITATION_S = DAY_S
TOKEN_BYTES = 16
_INVITATION = re.compile(r"edgetune://([^/\s]+:[0-9]{1,5})/([A-Za-z0-9_-]{43})/([A-Za-z0-9_-]{22})")


@dataclasses.dataclass(frozen=True)
class Invitation:
    """What a device needs to enrol: where, whom to trust, and by what right, once.

    `address` is where devices enrol, HOST:PORT; `authority` the SHA-256 of the coordinator's CA certificate in DER.
    """

    address: str
    authority: bytes
    token: bytes

    def text(self) -> str:
        """One string without spaces, for a person to paste."""
        return f"edgetune://{self.address}/{_base64(self.authority)}/{_base64(self.token)}"

    @classmethod
    def parse(cls, text: str) -> Invitation:
        """Raises UserError for what `edgetune coordinator invite` has not printed."""
        found = _INVITATION.fullmatch(text.strip())
        if not found:
            raise UserError(
                "this is no invitation: paste the whole `edgetune://…` that `edgetune coordinator invite` prints"
            )
        return cls(addresses.joined(*addresses.parse(found[1])), _bytes(found[2]), _bytes(found[3]))


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def _bytes(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def token_hash(token: bytes) -> str:
    """What a coordinator keeps of a token."""
    return hashlib.sha256(token).hexdigest()


def host_of(address: str) -> str:
    """The host of HOST:PORT, without the brackets of an IPv6 address."""
    return address.rpartition(":")[0].strip("[]")


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT is reached from this machine alone."""
    host = host_of(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclasses.dataclass(frozen=True)
class Card:
    """What a caller shows and whom it believes; its key lies beside it, in a file of its own.

    `coordinator` is HOST:PORT, empty where it is not known; certificates are PEM; `release_key` the Ed25519 public key of
    the coordinator's releases, as hexadecimal digits.
    """

    coordinator: str
    authority: str
    certificate: str
    release_key: str


def write_card(folder: Path, card: Card) -> None:
    write_private(folder / "identity.json", spec.canonical(card))


def read_card(folder: Path) -> Card | None:
    """None where nobody enrolled. Raises IdentityError for a file that is damaged."""
    try:
        return spec.parse(Card, json.loads((folder / "identity.json").read_bytes()), "identity")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, UserError) as error:
        raise IdentityError(f"{folder}: the identity kept here cannot be read: {error}") from error


def write_key(folder: Path, pem: str) -> None:
    write_private(folder / "key.pem", pem.encode())


def read_key(folder: Path) -> str | None:
    """None where there is none. Raises IdentityError where this user may not read it, or others may."""
    try:
        return read_private(folder / "key.pem")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise IdentityError(f"{folder}: the key kept here cannot be read: {error}") from error


def read_private(path: Path) -> str:
    """The text of a key that its owner alone can read; who was given it by another owner, as a mounted secret, may share it
    with that owner's group. Raises IdentityError where others can read it, OSError, ValueError."""
    status = path.stat()
    others = 0 if os.name == "nt" else 0o077 if status.st_uid == os.geteuid() else 0o007
    if status.st_mode & others:
        raise IdentityError(
            f"{path}: others can read this key (mode {status.st_mode & 0o777:04o}): chmod 600 {path}, and make a new one if"
            " somebody may have read it"
        )
    return path.read_text(encoding="ascii")


def write_private(path: Path, data: bytes) -> None:
    """A file for its owner's eyes alone, all or nothing. Raises MachineError."""
    with _writable(path):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        aside = path.with_name(path.name + ".aside")
        aside.unlink(missing_ok=True)
        handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(f"{path}: cannot be written: {error.strerror}") from error
