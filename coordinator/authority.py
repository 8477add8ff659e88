"""The coordinator's own certificate authority: a folder that `edgetune coordinator init` makes, and what is issued from it.

    ca.pem ca.key               the authority; who has its key can make any certificate
    enrolment.pem enrolment.key what the enrolment door answers with, for as long as the authority lives
    release.key                 signs releases (Ed25519)
    admin/                      an administrator's identity: copy it to where `edgetune run` is typed

Whoever can read the folder is the coordinator: keys have mode 0600, the folder 0700. What devices are answered with is no
file: each process makes its own pair when it starts, and another one before that ends, so that replicas share nothing but what
never changes. A device that enrols believes the very certificate that it has seen, so all replicas have that one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from wire import addresses, certificates
from wire.errors import IdentityError, MachineError, UserError
from wire.identity import DAY_S, Card, Role, read_private, write_card, write_key, write_private

AUTHORITY_S = 3650 * DAY_S
SERVER_S = 90 * DAY_S
ADMIN = "admin"


class Authority:
    """An opened folder. Raises IdentityError, with its name, for a file that is missing, damaged, of another authority, or
    a key that others can read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.certificate = self._text("ca.pem")
        self._key, self._release_key = self._text("ca.key", read_private), self._text("release.key", read_private)
        self.hosts = tuple(self._text("hosts").split())
        self.enrolment = (self._text("enrolment.key", read_private), self._text("enrolment.pem"))
        self._check()
        self.release_key = certificates.release_public(self._release_key)
        self._server, self._renew_server_at = self._new_server()

    @classmethod
    def found(cls, folder: Path) -> Authority | None:
        """None where `init` was not run."""
        return cls(folder) if cls.is_in(folder) else None

    @staticmethod
    def is_in(folder: Path) -> bool:
        """Whether `init` made one here, damaged or not."""
        return (folder / "ca.pem").exists()

    def issue(self, role: Role, name: str, public: ec.EllipticCurvePublicKey, lifetime_s: float) -> str:
        """A caller's certificate, PEM."""
        return certificates.for_caller(role, name, public, self._key, lifetime_s)

    def sign(self, digest: str) -> str:
        """The signature of a release's digest."""
        return certificates.sign_release(self._release_key, digest)

    def server(self) -> tuple[str, str]:
        """Key and certificate to answer with, PEM both: another pair once half of the life of the last is over."""
        if time.time() >= self._renew_server_at:
            self._server, self._renew_server_at = self._new_server()
        return self._server

    def _new_server(self) -> tuple[tuple[str, str], float]:
        """A pair, and when half of its life is over."""
        key = certificates.new_key()
        certificate = certificates.for_server(self.hosts, key, self._key, SERVER_S)
        return (key, certificate), sum(certificates.window(certificate)) / 2

    def _check(self) -> None:
        """Whether the files are what their names say, and belong together."""
        with self._named("ca.pem"):
            certificates.window(self.certificate)
        with self._named("ca.key"):
            certificates.check_pair(self._key, self.certificate)
        with self._named("release.key"):
            certificates.release_public(self._release_key)
        with self._named("enrolment.pem"):
            if not certificates.is_issued_by(self.enrolment[1], self.certificate):
                raise IdentityError("not a certificate of the authority in ca.pem")
        with self._named("enrolment.key"):
            certificates.check_pair(*self.enrolment)
        with self._named("hosts"):
            if not [addresses.host(host) for host in self.hosts]:
                raise IdentityError("names no host; what devices reach this coordinator by stands here, one a line")

    @contextlib.contextmanager
    def _named(self, name: str) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise IdentityError(f"{self.folder / name}: {error}") from error

    def _text(self, name: str, read: Callable[[Path], str] = Path.read_text) -> str:
        try:
            return read(self.folder / name)
        except (OSError, ValueError) as error:
            raise IdentityError(f"{self.folder / name}: cannot be read: {error}") from error


def create(folder: Path, hosts: Sequence[str]) -> Authority:
    """A new authority for a coordinator that is reached as `hosts`. Raises UserError where the folder has anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} is not empty: nothing was changed. Every device trusts what lies there; choose another --dir, or"
            " move it away if all devices shall enrol again"
        )
    aside = folder.with_name(folder.name + ".aside")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True, mode=0o700)
        _fill(aside, hosts)
        os.replace(aside, folder)  # all or nothing: fails where another `init` was quicker
    except OSError as error:
        raise MachineError(f"{folder}: cannot be made: {error.strerror}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Authority(folder)


def _fill(folder: Path, hosts: Sequence[str]) -> None:
    key, release_key = certificates.new_key(), certificates.new_release_key()
    certificate = certificates.authority(key, AUTHORITY_S)
    for name, text in {
        "ca.key": key,
        "ca.pem": certificate,
        "release.key": release_key,
        "hosts": "\n".join(hosts),
    }.items():
        write_private(folder / name, text.encode())
    enrolment_key = certificates.new_key()
    write_private(folder / "enrolment.key", enrolment_key.encode())
    enrolment = certificates.for_server(hosts, enrolment_key, key, AUTHORITY_S)
    write_private(folder / "enrolment.pem", enrolment.encode())
    admin_key = certificates.new_key()
    admin = certificates.for_caller("admin", ADMIN, certificates.public_of(admin_key), key, AUTHORITY_S)
    write_key(folder / "admin", admin_key)
    write_card(folder / "admin", Card("", certificate, admin, certificates.release_public(release_key)))
