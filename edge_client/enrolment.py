"""How a device gets its certificate, before it has one."""

from __future__ import annotations

import dataclasses
import ssl
from collections.abc import Callable
from typing import Any

import grpc

from edge_client.calls import ASK_AGAIN, CALL_S, FIRST_CONTACT_S, OPTIONS, Patience, as_ours, nobody
from protos.v1 import federation_pb2 as pb
from protos.v1 import federation_pb2_grpc as pb_grpc
from wire import addresses
from wire.errors import Refused, Unreachable
from wire.identity import Invitation

PATIENCE_S = 60.0
"""How long a coordinator that many enrol with at once is asked again."""


@dataclasses.dataclass(frozen=True)
class Enrolled:
    """A coordinator's answer to an enrolment, unchecked: a certificate (PEM), its release key, and where to go on."""

    certificate: str
    release_key: str
    port: int


def enrolled(
    invitation: Invitation, device: str, trust: Callable[[str], None], request: Callable[[], str]
) -> tuple[str, Enrolled]:
    """The CA certificate (PEM) of the coordinator that invited, and its answer.

    The token is sent only over TLS that this CA vouches for. To learn the CA a first channel believes whoever answers; what
    it says counts for nothing until `trust` has compared it with the invitation. `request` makes the signing request.
    """
    host, port = addresses.parse(invitation.address)
    try:
        shown = ssl.get_server_certificate((host, port), timeout=FIRST_CONTACT_S).encode()
    except (OSError, ValueError) as error:
        raise Unreachable(nobody(invitation.address, error)) from error
    message = pb.EnrollRequest(token=invitation.token, device=device)
    authority = str(_ask(invitation.address, shown, "Authority", pb.AuthorityRequest()).certificate_pem)
    trust(authority)
    message.request_pem = request()
    reply = _ask(invitation.address, authority.encode(), "Enroll", message)
    return authority, Enrolled(reply.certificate_pem, reply.release_key, reply.port)


def _ask(address: str, believed: bytes, method: str, message: Any) -> Any:
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(believed), options=OPTIONS) as channel:
        stub = pb_grpc.EnrolmentStub(channel)  # type: ignore[no-untyped-call]  # generated code
        patience = Patience(address, PATIENCE_S, plain=False)
        while True:
            try:
                return getattr(stub, method)(message, timeout=CALL_S)
            except grpc.RpcError as error:
                ours = as_ours(error)
                if not isinstance(ours, Refused):
                    raise Unreachable(nobody(address, ours)) from error
                patience.pause(ours, ASK_AGAIN)
