"""Every call of the contract, by everybody who should not make it: what they are told is in the table of errors.

The calls are read from the contract itself: one that is added has to be written into a set here, and is then tried by all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message

from coordinator import authority
from coordinator.authority import Authority
from edge_client.calls import as_ours
from edge_client.identity import Identity, enroll
from edge_client.transport import Connection
from protos.v1 import federation_pb2 as pb
from tests.coordinator.test_identities import enrolled, invitation, message
from tests.coordinator.test_permissions import METHODS
from tests.processes import CoordinatorProcess, administrator, identified
from tests.updates import BIG, make, update
from wire import certificates
from wire.contract import CONTRACT
from wire.errors import Reason, Refused, RemoteError
from wire.identity import Invitation
from wire.messages import Contribution, Task

DEVICES = {"CheckIn", "Submit", "CreateUpload", "AppendUpload", "Commit", "Leave"}
BOTH = {"DescribeRun", "FetchRelease", "Upload", "Renew"}
ANYONE = {"Authority", "Enroll"}
ADMINISTRATORS = {
    "CreateRun", "ControlRun", "GetRun", "ListRuns", "WatchRun", "Invite", "ListDevices", "Revoke", "Thaw",
    "ListAdministrators", "RevokeAdministrator",
}  # fmt: skip
NAMES = {short: method for method in METHODS for short in [method.rpartition("/")[2]]}
NO_HANDSHAKE = grpc.StatusCode.UNAVAILABLE
Tls = tuple[bytes, ...]


def test_every_method_of_the_contract_is_tried() -> None:
    sets = (DEVICES, BOTH, ANYONE, ADMINISTRATORS)
    assert set(NAMES) == set.union(*sets) and len(NAMES) == sum(map(len, sets)) == len(METHODS)


@dataclasses.dataclass(frozen=True)
class Scene:
    """A coordinator, and what each caller has: an address, whom to believe, perhaps a key and a certificate."""

    coordinator: CoordinatorProcess
    callers: dict[str, tuple[str, Tls]]
    others: Contribution
    upload: str
    """A task of another owner's device, and its upload."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    folder = tmp_path_factory.mktemp("scene")
    other = authority.create(folder / "other", ["localhost"])
    with identified(folder / "store") as coordinator, administrator(coordinator) as admin:
        own = {name: enrolled(coordinator, folder / name, name, f"of-{name}") for name in ("d1", "d2", "gone", "cold")}
        bea, ex = (
            enroll(Invitation.parse(admin.invite_administrator(name, 60.0)[0]), folder / name, name)
            for name in ("bea", "ex")
        )
        admin.revoke("gone")
        admin.revoke_administrator("ex")
        freeze(coordinator, folder)
        others, upload = work_of(own["d2"], admin, coordinator)
        issuer, (roots, key, _) = Authority(coordinator.identity), own["d1"].tls()
        public = certificates.public_of(key.decode())
        fresh = certificates.new_key()
        here = coordinator.address
        yield Scene(
            coordinator,
            {
                "no certificate": (here, (roots,)),
                "no certificate, where none is asked for": (coordinator.enrolment, (roots,)),
                "another authority's": (here, (roots, key, other.issue("device", "d1", public, 60.0).encode())),
                "expired": (here, (roots, key, issuer.issue("device", "d1", public, -1.0).encode())),
                "another key": (
                    here, (roots, fresh.encode(), issuer.issue("device", "d1", certificates.public_of(fresh), 60.0).encode())
                ),
                "revoked": (here, own["gone"].tls()),
                "frozen": (here, own["cold"].tls()),
                "revoked administrator": (here, ex.tls()),
                "device": (here, own["d1"].tls()),
                "administrator": (here, bea.tls()),
            },
            others,
            upload,
        )  # fmt: skip


def freeze(coordinator: CoordinatorProcess, folder: Path) -> None:
    """Bring the invitation of a device again."""
    text = Invitation.parse(invitation(coordinator, "of-cold"))
    enroll(text, folder / "cold", "cold")
    with pytest.raises(Refused):
        enroll(text, folder / "thief", "cold")


def work_of(identity: Identity, admin: Connection, coordinator: CoordinatorProcess) -> tuple[Contribution, str]:
    """A task and an upload that another device has."""
    run = make("theirs", cohort={"goal": 1})
    admin.create_run(run, BIG, np.zeros(BIG.size, np.float32))
    with Connection(coordinator.address, identity=identity) as device:
        task = device.check_in("d2", ("theirs",), 5.0)
        assert isinstance(task, Task)
        mine = dataclasses.replace(update(run, task, BIG)[0], device="d2")
        return mine, str(device._devices.CreateUpload(mine.to_proto()).upload)


def told(scene: Scene, who: str, short: str, request: Message) -> Reason | grpc.StatusCode | None:
    """How a call ends: by a reason, with its status as the table says, or by a bare status; None where it was answered."""
    address, tls = scene.callers[who]
    method = METHODS[NAMES[short]]
    shape = f"{'stream' if method.client_streaming else 'unary'}_{'stream' if method.server_streaming else 'unary'}"
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(*tls)) as channel:
        call = getattr(channel, shape)(NAMES[short], type(request).SerializeToString, bytes)
        try:
            answer = call(iter([request]) if method.client_streaming else request, timeout=5)
            if method.server_streaming:
                next(iter(answer), None)
        except grpc.RpcError as error:
            return in_the_table(as_ours(error), error.code())
    return None


def in_the_table(ours: RemoteError, code: grpc.StatusCode) -> Reason | grpc.StatusCode:
    if not isinstance(ours, Refused):
        return code
    assert code.name == CONTRACT[ours.reason].status
    return ours.reason


def by_role(short: str, role: str, otherwise: Reason) -> Reason:
    """What somebody is told whose role is looked at before all else."""
    wrong = ADMINISTRATORS if role == "device" else DEVICES
    return Reason.NOT_ALLOWED if short in wrong else otherwise


@pytest.mark.parametrize("short", sorted(NAMES))
@pytest.mark.parametrize(
    ("who", "name"),
    [
        ("no certificate", "d1"),
        ("another authority's", "d1"),
        ("expired", "d1"),
        ("no certificate, where none is asked for", "d1"),
        ("another key", "d1"),
        ("revoked", "gone"),
        ("frozen", "cold"),
        ("revoked administrator", "ex"),
    ],
)
def test_who_is_not_welcome_is_told_why(scene: Scene, who: str, name: str, short: str) -> None:
    role = "admin" if who == "revoked administrator" else "device"
    expected: Reason | grpc.StatusCode = {
        "another key": by_role(short, role, Reason.NOT_ENROLLED),
        "revoked": by_role(short, role, Reason.REVOKED),
        "frozen": by_role(short, role, Reason.FROZEN),
        "revoked administrator": by_role(short, role, Reason.REVOKED),
        "no certificate, where none is asked for": Reason.NOT_ENROLLED,
    }.get(who, NO_HANDSHAKE)
    found = told(scene, who, short, message(NAMES[short], name))
    if short in ANYONE and who == "no certificate, where none is asked for":
        assert found in (None, Reason.BAD_REQUEST)  # the empty request is no signing request
    else:
        assert found is expected


@pytest.mark.parametrize("short", sorted(ADMINISTRATORS))
def test_administration_is_not_for_devices(scene: Scene, short: str) -> None:
    assert told(scene, "device", short, message(NAMES[short], "d1")) is Reason.NOT_ALLOWED


@pytest.mark.parametrize("short", sorted(DEVICES))
def test_the_work_of_devices_is_not_for_administrators(scene: Scene, short: str) -> None:
    assert told(scene, "administrator", short, message(NAMES[short], "d1")) is Reason.NOT_ALLOWED


@pytest.mark.parametrize("short", sorted(DEVICES | {"Enroll"}))
def test_nobody_calls_in_the_name_of_another_device(scene: Scene, short: str) -> None:
    assert told(scene, "device", short, message(NAMES[short], "d2")) is Reason.FOREIGN_DEVICE


def test_nobody_works_on_what_another_owners_device_was_given(scene: Scene) -> None:
    """Under its own name, with the task and the upload of another."""
    mine = dataclasses.replace(scene.others, device="d1").to_proto()
    part = pb.UploadPart(upload=scene.upload, device="d1", offset=0, digest="a" * 64, data=b"x")
    tried = {
        "Submit": pb.SubmitRequest(contribution=mine, payload=b"x"),
        "CreateUpload": mine,
        "Commit": mine,
        "AppendUpload": part,
    }
    for short, request in tried.items():
        assert told(scene, "device", short, request) is Reason.NOT_ASSIGNED, short
    leaving = pb.LeaveRequest(device="d1", run="theirs", round=mine.round, attempt=mine.attempt)
    with administrator(scene.coordinator) as admin:
        assert told(scene, "device", "Leave", leaving) is None  # it had nothing to give back
        status = admin.status("theirs")
    assert (status.offered, status.accepted) == (1, 0)


@pytest.mark.parametrize("short", sorted(set(NAMES) - {"WatchRun"}))
def test_who_is_welcome_is_heard(scene: Scene, short: str) -> None:
    """The request is empty, and may be refused for that: but not for who made it."""
    who, name = ("administrator", "nobody") if short in ADMINISTRATORS else ("device", "d1")
    about_callers = {
        Reason.NOT_ENROLLED, Reason.REVOKED, Reason.FROZEN, Reason.NOT_ALLOWED, Reason.FOREIGN_DEVICE, NO_HANDSHAKE,
    }  # fmt: skip
    assert told(scene, who, short, message(NAMES[short], name)) not in about_callers
