"""Who may call what. A method that is not in the table may be called by nobody."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

from google.protobuf.message import Message

from wire.certificates import Certificate
from wire.errors import Reason, Refused

Who = Literal["anyone", "device", "admin"]
"""`anyone` needs no certificate: what the call may do follows from what it carries, a token or nothing at all."""

MAY_CALL: Mapping[str, frozenset[Who]] = {
    "/edgetune.v1.Federation/CheckIn": frozenset({"device"}),
    "/edgetune.v1.Federation/DescribeRun": frozenset({"device", "admin"}),
    "/edgetune.v1.Federation/FetchRelease": frozenset({"device", "admin"}),
    "/edgetune.v1.Federation/Submit": frozenset({"device"}),
    "/edgetune.v1.Federation/CreateUpload": frozenset({"device"}),
    "/edgetune.v1.Federation/AppendUpload": frozenset({"device"}),
    "/edgetune.v1.Federation/Upload": frozenset({"device", "admin"}),
    "/edgetune.v1.Federation/Commit": frozenset({"device"}),
    "/edgetune.v1.Federation/Leave": frozenset({"device"}),
    "/edgetune.v1.Administration/CreateRun": frozenset({"admin"}),
    "/edgetune.v1.Administration/ControlRun": frozenset({"admin"}),
    "/edgetune.v1.Administration/GetRun": frozenset({"admin"}),
    "/edgetune.v1.Administration/ListRuns": frozenset({"admin"}),
    "/edgetune.v1.Administration/WatchRun": frozenset({"admin"}),
    "/edgetune.v1.Administration/Invite": frozenset({"admin"}),
    "/edgetune.v1.Administration/ListDevices": frozenset({"admin"}),
    "/edgetune.v1.Administration/Revoke": frozenset({"admin"}),
    "/edgetune.v1.Administration/Thaw": frozenset({"admin"}),
    "/edgetune.v1.Administration/ListAdministrators": frozenset({"admin"}),
    "/edgetune.v1.Administration/RevokeAdministrator": frozenset({"admin"}),
    "/edgetune.v1.Enrolment/Authority": frozenset({"anyone"}),
    "/edgetune.v1.Enrolment/Enroll": frozenset({"anyone"}),
    "/edgetune.v1.Enrolment/Renew": frozenset({"device", "admin"}),
    "/grpc.health.v1.Health/Check": frozenset({"anyone"}),
    "/grpc.health.v1.Health/Watch": frozenset({"anyone"}),
}


def check_method(method: str, caller: Certificate | None) -> None:
    """Raises Refused: NOT_ENROLLED for a caller without a certificate, NOT_ALLOWED for one of another role."""
    allowed = MAY_CALL.get(method, frozenset())
    if "anyone" in allowed or (caller is not None and caller.role in allowed):
        return
    if caller is None and allowed:
        raise Refused(Reason.NOT_ENROLLED, "this call needs a certificate; `edgetune client enroll` gets one")
    raise Refused(Reason.NOT_ALLOWED, f"{caller.role if caller else 'nobody'} may not call {method}")


def check_names(message: Message, caller: Certificate | None) -> None:
    """A device speaks for itself alone: FOREIGN_DEVICE where a message names another, however deep."""
    if caller is None or caller.role != "device":
        return
    for name in _devices(message):
        if name != caller.name:
            raise Refused(
                Reason.FOREIGN_DEVICE, f"the certificate is that of {caller.name}, and the call is for {name!r}"
            )


def _devices(message: Message) -> Iterator[str]:
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.name == "device":
            yield value
        elif field.type == field.TYPE_MESSAGE:
            for inner in value if field.is_repeated else [value]:
                yield from _devices(inner)
