"""The table of who may call what, against the contract itself."""

from __future__ import annotations

import time
from typing import Any

import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from coordinator.permissions import MAY_CALL, check_method, check_names
from protos.v1 import federation_pb2 as pb
from wire.certificates import Certificate
from wire.errors import Reason, Refused
from wire.identity import Role

SERVICES = pb.DESCRIPTOR.services_by_name.values()
METHODS = {f"/{service.full_name}/{m.name}": m for service in SERVICES for m in service.methods}


def caller(role: Role) -> Certificate:
    return Certificate(role, "d1", "a" * 64, 0.0, time.time() + 60)


def reason(call: Any) -> Reason | None:
    try:
        call()
    except Refused as refused:
        return refused.reason
    return None


def test_every_method_of_the_contract_has_a_row() -> None:
    assert set(METHODS) == {name for name in MAY_CALL if not name.startswith("/grpc.health")}


@pytest.mark.parametrize("who", [None, caller("device"), caller("admin")])
def test_a_method_without_a_row_is_nobodys(who: Certificate | None) -> None:
    assert reason(lambda: check_method("/edgetune.v1.Federation/Shutdown", who)) is Reason.NOT_ALLOWED


@pytest.mark.parametrize("method", sorted(METHODS))
def test_administration_is_for_administrators_and_work_for_devices(method: str) -> None:
    as_device = reason(lambda: check_method(method, caller("device")))
    as_admin = reason(lambda: check_method(method, caller("admin")))
    if method.startswith("/edgetune.v1.Administration/"):
        assert (as_device, as_admin) == (Reason.NOT_ALLOWED, None)
    elif method.rpartition("/")[2] in {"CheckIn", "Submit", "Commit", "Leave"}:
        assert (as_device, as_admin) == (None, Reason.NOT_ALLOWED)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_without_a_certificate_only_enrolment_is_open(method: str) -> None:
    found = reason(lambda: check_method(method, None))
    assert found is (None if method.endswith(("/Authority", "/Enroll")) else Reason.NOT_ENROLLED)


def filled(message: Message, device: str) -> bool:
    """Write `device` into every field of that name, however deep; whether there was one."""
    there = False
    for field in message.DESCRIPTOR.fields:
        if field.name == "device":
            setattr(message, field.name, device)
            there = True
        elif field.type == field.TYPE_MESSAGE:
            inner = getattr(message, field.name)
            there = filled(inner.add() if field.is_repeated else inner, device) or there
    return there


@pytest.mark.parametrize("method", sorted(METHODS))
def test_no_message_lets_a_device_speak_for_another(method: str) -> None:
    made = GetMessageClass(METHODS[method].input_type)()
    names_one = filled(made, "d2")
    assert reason(lambda: check_names(made, caller("device"))) is (Reason.FOREIGN_DEVICE if names_one else None)
    if names_one:
        filled(made, "d1")
        assert reason(lambda: check_names(made, caller("device"))) is None
        filled(made, "")
        assert reason(lambda: check_names(made, caller("device"))) is Reason.FOREIGN_DEVICE


def test_the_messages_that_name_a_device_are_found() -> None:
    naming = {name for name, m in METHODS.items() if filled(GetMessageClass(m.input_type)(), "d")}
    assert {n.rpartition("/")[2] for n in naming} == {
        "CheckIn",
        "Submit",
        "CreateUpload",
        "AppendUpload",
        "Commit",
        "Leave",
        "Revoke",
        "Thaw",
        "Enroll",
    }
