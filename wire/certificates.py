"""X.509 certificates and release signatures: the only file here that imports a cryptographic library.

TLS keys are ECDSA P-256, because grpcio refuses Ed25519 in certificates; releases are signed with Ed25519. Who a certificate
speaks for stands in one URI of its subjectAltName, `edgetune://device/NAME` or `edgetune://admin/NAME`, and nowhere else.
Keys and certificates are PEM texts; times are seconds since 1970.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import ipaddress
import re
import time
from collections.abc import Sequence
from typing import cast

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from wire.errors import IdentityError, PayloadError, Reason
from wire.identity import Role

BACKDATED_S = 300.0
"""A certificate begins this long before it was issued: the other end's clock may be behind."""
MAX_REQUEST = 4096
"""Characters of a signing request; one of ours has 400."""
_SUBJECT = re.compile(r"edgetune://(device|admin)/([a-z0-9][a-z0-9._-]{0,63})")
_SIGNED = b"edgetune-release "
"""Before the digest in what is signed: a signature means this and nothing else."""


@dataclasses.dataclass(frozen=True)
class Certificate:
    """What a certificate says of its holder. `key` is the SHA-256 of its public key (SubjectPublicKeyInfo)."""

    role: Role
    name: str
    key: str
    not_before: float
    not_after: float

    @property
    def renew_at(self) -> float:
        """When half of its life is over."""
        issued = self.not_before + BACKDATED_S
        return issued + (self.not_after - issued) / 2

    def check_window(self, now: float) -> None:
        """Raises IdentityError where `now` is not within it; nobody else would say why a handshake failed."""
        if now >= self.not_after:
            raise IdentityError(
                f"the certificate of {self.role} {self.name} expired {_date(self.not_after)}: ask whoever administers the"
                " coordinator for a new invitation, then `edgetune client enroll` again; what this device keeps stays"
            )
        if now < self.not_before:
            raise IdentityError(
                f"the certificate of {self.role} {self.name} is valid from {_date(self.not_before)}, and this machine's"
                f" clock says {_date(now)}: set the clock right"
            )


def _date(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def new_key() -> str:
    """A fresh P-256 private key."""
    return _private_pem(ec.generate_private_key(ec.SECP256R1()))


def new_release_key() -> str:
    """A fresh Ed25519 private key."""
    return _private_pem(ed25519.Ed25519PrivateKey.generate())


def _private_pem(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> str:
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()).decode()


def _load(key: str) -> ec.EllipticCurvePrivateKey:
    try:
        loaded = serialization.load_pem_private_key(key.encode(), None)
    except (ValueError, TypeError) as error:
        raise IdentityError(f"a private key is damaged: {error}") from error
    if not isinstance(loaded, ec.EllipticCurvePrivateKey):
        raise IdentityError("a private key is not of the kind that TLS needs (P-256)")
    return loaded


def request(key: str) -> str:
    """A signing request: the public half of `key`, with the proof that its sender has the other half."""
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(_load(key), hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def requested(text: str) -> ec.EllipticCurvePublicKey:
    """The public key of a signing request from the network. Raises PayloadError."""
    if len(text) > MAX_REQUEST:
        raise PayloadError(Reason.BAD_REQUEST, f"a signing request has at most {MAX_REQUEST} characters")
    try:
        parsed = x509.load_pem_x509_csr(text.encode())
        valid = parsed.is_signature_valid
        public = parsed.public_key()
    except Exception as error:  # whatever a parser of foreign bytes raises, they are bad bytes
        raise PayloadError(Reason.BAD_REQUEST, f"not a certificate signing request: {error}") from error
    if not valid or not isinstance(public, ec.EllipticCurvePublicKey) or not isinstance(public.curve, ec.SECP256R1):
        raise PayloadError(Reason.BAD_REQUEST, "a signing request must hold a P-256 key and be signed with it")
    return public


def key_digest(public: ec.EllipticCurvePublicKey) -> str:
    """SHA-256 of a public key, as hexadecimal digits: what a device is known by beside its name."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(public.public_bytes(serialization.Encoding.DER, form)).hexdigest()


def public_of(key: str) -> ec.EllipticCurvePublicKey:
    """The public half of a private key."""
    return _load(key).public_key()


def check_pair(key: str, pem: str) -> None:
    """Raises IdentityError unless `key` is that of the certificate `pem`."""
    if key_digest(public_of(key)) != key_digest(public_key(pem)):
        raise IdentityError("the key is not that of the certificate beside it")


def authority(key: str, lifetime_s: float) -> str:
    """The self-signed certificate of a new certificate authority."""
    builder = _builder("edgetune authority", "edgetune authority", _load(key).public_key(), lifetime_s)
    usage = x509.KeyUsage(
        digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
        key_agreement=False, key_cert_sign=True, crl_sign=True, encipher_only=False, decipher_only=False,
    )  # fmt: skip
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    return _signed(builder.add_extension(usage, critical=True), key)


def for_caller(role: Role, name: str, public: ec.EllipticCurvePublicKey, issuer_key: str, lifetime_s: float) -> str:
    """A certificate that lets its holder call as `name`."""
    subject = x509.UniformResourceIdentifier(f"edgetune://{role}/{name}")
    builder = _builder(name, "edgetune authority", public, lifetime_s)
    return _leaf(builder, [subject], ExtendedKeyUsageOID.CLIENT_AUTH, issuer_key)


def for_server(hosts: Sequence[str], key: str, issuer_key: str, lifetime_s: float) -> str:
    """A certificate that lets its holder answer under `hosts`, names or addresses."""
    builder = _builder("edgetune coordinator", "edgetune authority", _load(key).public_key(), lifetime_s)
    return _leaf(builder, [_host(host) for host in hosts], ExtendedKeyUsageOID.SERVER_AUTH, issuer_key)


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _builder(
    subject: str, issuer: str, public: ec.EllipticCurvePublicKey, lifetime_s: float
) -> x509.CertificateBuilder:
    now = datetime.datetime.fromtimestamp(time.time(), datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(seconds=BACKDATED_S))
        .not_valid_after(now + datetime.timedelta(seconds=lifetime_s))
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _leaf(
    builder: x509.CertificateBuilder, names: list[x509.GeneralName], use: x509.ObjectIdentifier, issuer_key: str
) -> str:
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([use]), critical=True)
    return _signed(builder.add_extension(x509.SubjectAlternativeName(names), critical=False), issuer_key)


def _signed(builder: x509.CertificateBuilder, issuer_key: str) -> str:
    return builder.sign(_load(issuer_key), hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def read(pem: str) -> Certificate:
    """What a caller's certificate says. Raises IdentityError for one that names no caller."""
    parsed = _parsed(pem)
    try:
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound as error:
        raise IdentityError("the certificate names nobody") from error
    found = [m for uri in names.get_values_for_type(x509.UniformResourceIdentifier) if (m := _SUBJECT.fullmatch(uri))]
    public = parsed.public_key()
    if len(found) != 1 or not isinstance(public, ec.EllipticCurvePublicKey):
        raise IdentityError("the certificate is not one of edgetune's")
    role = cast(Role, found[0][1])
    return Certificate(role, found[0][2], key_digest(public), *_window(parsed))


def window(pem: str) -> tuple[float, float]:
    """When any certificate begins and ends."""
    return _window(_parsed(pem))


def public_key(pem: str) -> ec.EllipticCurvePublicKey:
    """The key that a certificate of ours certifies."""
    return cast(ec.EllipticCurvePublicKey, _parsed(pem).public_key())


def fingerprint(pem: str) -> bytes:
    """SHA-256 of a certificate in DER, 32 bytes."""
    return _parsed(pem).fingerprint(hashes.SHA256())


def is_issued_by(pem: str, authority_pem: str) -> bool:
    """Whether `pem` bears a signature of `authority_pem`'s key."""
    try:
        _parsed(pem).verify_directly_issued_by(_parsed(authority_pem))
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _parsed(pem: str) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(pem.encode())
    except ValueError as error:
        raise IdentityError(f"a certificate is damaged: {error}") from error


def _window(parsed: x509.Certificate) -> tuple[float, float]:
    return parsed.not_valid_before_utc.timestamp(), parsed.not_valid_after_utc.timestamp()


def sign_release(key: str, digest: str) -> str:
    """The Ed25519 signature of a release's digest, as hexadecimal digits: the same for the same key and digest."""
    return _release_key(key).sign(_SIGNED + digest.encode()).hex()


def release_public(key: str) -> str:
    """The public half of a release key, 32 bytes as hexadecimal digits."""
    return _release_key(key).public_key().public_bytes_raw().hex()


def _release_key(key: str) -> ed25519.Ed25519PrivateKey:
    try:
        loaded = serialization.load_pem_private_key(key.encode(), None)
    except (ValueError, TypeError) as error:
        raise IdentityError(f"a private key is damaged: {error}") from error
    if not isinstance(loaded, ed25519.Ed25519PrivateKey):
        raise IdentityError("the release key is not an Ed25519 key")
    return loaded


def is_signed(digest: str, signature: str, public: str) -> bool:
    """Whether `signature` is that of a release's digest by the holder of `public`. Total: bad digits are a no."""
    try:
        key = ed25519.Ed25519PublicKey.from_public_bytes(bytes.fromhex(public))
        key.verify(bytes.fromhex(signature), _SIGNED + digest.encode())
    except (ValueError, InvalidSignature):
        return False
    return True
