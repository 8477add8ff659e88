"""Who makes a call, as TLS has proved it."""

from __future__ import annotations

import functools

import grpc

from wire import certificates
from wire.certificates import Certificate
from wire.errors import IdentityError, Reason, Refused


def presented(context: grpc.aio.ServicerContext) -> Certificate | None:
    """Whom the certificate of a call speaks for; None without one. TLS has checked who issued it."""
    pem = presented_pem(context)
    return None if pem is None else _read(pem)


def presented_pem(context: grpc.aio.ServicerContext) -> str | None:
    """The certificate of a call, PEM."""
    found = context.auth_context().get("x509_pem_cert")
    return found[0].decode() if found else None


@functools.lru_cache(4096)
def _read(pem: str) -> Certificate:
    try:
        return certificates.read(pem)
    except IdentityError as error:
        raise Refused(Reason.NOT_ENROLLED, str(error)) from error
