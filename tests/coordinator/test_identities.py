"""A real coordinator with identities, and callers who are not who they should be."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator import authority, serve
from coordinator.authority import Authority
from coordinator.gate import MOST_OPEN
from edge_client.calls import as_ours
from edge_client.identity import Identity, enroll
from edge_client.transport import Connection
from protos.v1 import federation_pb2 as pb
from protos.v1 import federation_pb2_grpc as pb_grpc
from tests.coordinator.test_permissions import METHODS, filled
from tests.processes import CoordinatorProcess, administrator, edgetune, identified
from tests.updates import BIG, LAYOUT, created, make, update
from wire import certificates
from wire.errors import IdentityError, Reason, Refused, Unreachable
from wire.identity import Invitation
from wire.messages import PROTOCOL, Task


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CoordinatorProcess]:
    with identified(tmp_path_factory.mktemp("store")) as process:
        yield process


@pytest.fixture(scope="module")
def devices(coordinator: CoordinatorProcess, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Identity]:
    """Two devices, enrolled."""
    return {name: enrolled(coordinator, tmp_path_factory.mktemp(name), name) for name in ("d1", "d2")}


def invitation(coordinator: CoordinatorProcess, owner: str = "ann", quota: int | None = None, s: float = 60.0) -> str:
    with administrator(coordinator) as admin:
        return admin.invite(owner, quota, s)[0]


def enrolled(coordinator: CoordinatorProcess, folder: Path, name: str, owner: str = "ann") -> Identity:
    return enroll(Invitation.parse(invitation(coordinator, owner)), folder, name)


def reason_of(call: Callable[[], Any]) -> Reason:
    with pytest.raises(Refused) as caught:
        call()
    return caught.value.reason


def raw(
    address: str, tls: tuple[bytes, bytes, bytes] | None, authority_pem: bytes, method: str, request: Message
) -> Any:
    """One call with nothing of ours in between: the status, or None if it was answered."""
    roots, *pair = tls or (authority_pem,)
    credentials = grpc.ssl_channel_credentials(roots, *pair)
    kind = METHODS.get(method)
    with grpc.secure_channel(address, credentials) as channel:
        shape = ("stream" if kind and kind.client_streaming else "unary") + (
            "_stream" if kind and kind.server_streaming else "_unary"
        )
        call = getattr(channel, shape)(method, type(request).SerializeToString, bytes)
        try:
            answer = call(iter([request]) if shape.startswith("stream") else request, timeout=5)
            if shape.endswith("_stream"):
                next(iter(answer), None)
        except grpc.RpcError as error:
            return error.code()
    return None


def message(method: str, device: str) -> Message:
    made: Message = GetMessageClass(METHODS[method].input_type)()
    filled(made, device)
    return made


# The handshake.


def test_the_handshake_lets_in_only_whom_this_authority_certified(
    coordinator: CoordinatorProcess, devices: dict[str, Identity], tmp_path: Path
) -> None:
    ours = Authority(coordinator.identity)
    other = authority.create(tmp_path / "other", ["localhost"])
    roots, key, _ = devices["d1"].tls()
    public = certificates.public_of(key.decode())
    strangers: dict[str, tuple[bytes, bytes, bytes] | None] = {
        "no certificate": None,
        "another authority's": (roots, key, other.issue("device", "d1", public, 60.0).encode()),
        "self-signed": (roots, key, certificates.for_caller("device", "d1", public, key.decode(), 60.0).encode()),
        "expired": (roots, key, ours.issue("device", "d1", public, -1.0).encode()),
        "the coordinator's own": (roots, ours.server()[0].encode(), ours.server()[1].encode()),
        "a certificate that a device signed": (
            roots, key, certificates.for_caller("admin", "d1", public, key.decode(), 60.0).encode(),
        ),
    }  # fmt: skip
    method = "/edgetune.v1.Federation/CheckIn"
    for what, tls in strangers.items():
        assert raw(coordinator.address, tls, roots, method, message(method, "d1")) is grpc.StatusCode.UNAVAILABLE, what
    # the same call with the device's own certificate reaches the coordinator, which refuses its protocol 0
    assert raw(coordinator.address, devices["d1"].tls(), roots, method, message(method, "d1")) is (
        grpc.StatusCode.INVALID_ARGUMENT
    )


def test_a_device_does_not_talk_to_a_coordinator_of_another_authority(
    coordinator: CoordinatorProcess, devices: dict[str, Identity], tmp_path: Path
) -> None:
    other = authority.create(tmp_path / "other", ["localhost"])
    _, key, own = devices["d1"].tls()
    code = raw(
        coordinator.address, (other.certificate.encode(), key, own), b"", "/edgetune.v1.Federation/CheckIn",
        pb.CheckInRequest(device="d1"),
    )  # fmt: skip
    assert code is grpc.StatusCode.UNAVAILABLE


def test_a_plain_call_does_not_reach_it_and_the_hint_says_why(coordinator: CoordinatorProcess) -> None:
    with Connection(coordinator.address) as plain, pytest.raises(Unreachable, match="without one"):
        plain.runs()


def test_a_certificate_for_another_host_is_not_believed(tmp_path: Path) -> None:
    """The server's names count: a certificate for elsewhere is no proof of being here."""
    authority.create(tmp_path / "store" / "identity", ["fl.example.org"])
    with (
        CoordinatorProcess(tmp_path / "store") as elsewhere,
        administrator(elsewhere) as admin,
        pytest.raises(Unreachable),
    ):
        admin.runs()


# What a certificate allows. Every call by everybody is in `test_every_call.py`.


def test_a_method_that_nobody_wrote_into_the_table_is_refused_to_administrators_too(
    coordinator: CoordinatorProcess,
) -> None:
    """The health service answers List, which has no row."""
    admin = Identity.read(coordinator.identity / "admin")
    code = raw(coordinator.address, admin.tls(), b"", "/grpc.health.v1.Health/List", pb.ListRunsRequest())
    assert code is grpc.StatusCode.PERMISSION_DENIED


def test_health_answers_without_a_certificate(coordinator: CoordinatorProcess) -> None:
    roots = Authority(coordinator.identity).certificate.encode()
    with grpc.secure_channel(coordinator.enrolment, grpc.ssl_channel_credentials(roots)) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_a_certificate_that_ends_while_its_connection_is_open_ends_its_calls(
    coordinator: CoordinatorProcess, devices: dict[str, Identity]
) -> None:
    roots, key, _ = devices["d1"].tls()
    short = Authority(coordinator.identity).issue("device", "d1", certificates.public_of(key.decode()), 2.0)
    with grpc.secure_channel(coordinator.address, grpc.ssl_channel_credentials(roots, key, short.encode())) as channel:
        call = channel.unary_unary("/edgetune.v1.Federation/CheckIn", pb.CheckInRequest.SerializeToString, bytes)
        request = pb.CheckInRequest(device="d1", protocol=1)
        call(request, timeout=5)
        time.sleep(2.1)
        with pytest.raises(grpc.RpcError) as caught:
            call(request, timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "expired" in (caught.value.details() or "")


# Enrolment.


def test_a_token_is_good_once(coordinator: CoordinatorProcess, tmp_path: Path) -> None:
    text = Invitation.parse(invitation(coordinator))
    enroll(text, tmp_path / "one", "once-1")
    assert reason_of(lambda: enroll(text, tmp_path / "two", "once-2")) is Reason.BAD_TOKEN
    assert reason_of(lambda: enroll(text, tmp_path / "three", "once-1")) is Reason.BAD_TOKEN


def test_a_device_whose_answer_was_lost_may_ask_again(coordinator: CoordinatorProcess, tmp_path: Path) -> None:
    text = Invitation.parse(invitation(coordinator))
    first = enroll(text, tmp_path, "again")
    (tmp_path / "identity.json").unlink()
    assert enroll(text, tmp_path, "again").certificate.key == first.certificate.key


def test_two_who_bring_one_token_at_once_are_one_device(coordinator: CoordinatorProcess, tmp_path: Path) -> None:
    text = Invitation.parse(invitation(coordinator, "race"))
    barrier, outcomes = threading.Barrier(6), list[Any]()

    def attempt(n: int) -> None:
        barrier.wait()
        try:
            outcomes.append(enroll(text, tmp_path / str(n), f"racer-{n}"))
        except Refused as refused:
            outcomes.append(refused.reason)

    threads = [threading.Thread(target=attempt, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(isinstance(o, Identity) for o in outcomes) == 1
    assert outcomes.count(Reason.BAD_TOKEN) == 5
    assert standing(coordinator, next(o for o in outcomes if isinstance(o, Identity)).certificate.name) == (
        "frozen", "second_use",
    )  # fmt: skip


def standing(coordinator: CoordinatorProcess, name: str) -> tuple[str, str]:
    """State and alarm of a device, as administrators see them."""
    with administrator(coordinator) as admin:
        return next((device.state, device.alarm) for device in admin.devices() if device.name == name)


def test_an_invitation_that_is_brought_again_freezes_its_device_until_somebody_has_looked(
    coordinator: CoordinatorProcess, tmp_path: Path
) -> None:
    text = Invitation.parse(invitation(coordinator))
    identity = enroll(text, tmp_path / "mine", "first")
    with Connection(coordinator.address, identity=identity) as device, administrator(coordinator) as admin:
        device.check_in("first", (), 0.0)
        assert reason_of(lambda: enroll(text, tmp_path / "thief", "second")) is Reason.BAD_TOKEN
        assert standing(coordinator, "first") == ("frozen", "second_use")
        time.sleep(1.1)
        assert reason_of(lambda: device.check_in("first", (), 0.0)) is Reason.FROZEN
        assert (admin.thaw("first").state, admin.thaw("first").alarm) == ("active", "")
        device.check_in("first", (), 0.0)
        listed = edgetune("coordinator", "devices", *coordinator.admin).stdout
    (_, after) = listed.split("first: active")
    assert not after.splitlines()[1].startswith("  look at it")


def test_of_two_who_bring_one_invitation_to_two_coordinators_of_one_store_one_is_enrolled_and_frozen(
    tmp_path: Path, postgres_server: Any
) -> None:
    made = authority.create(tmp_path / "keys", ["localhost", "127.0.0.1"])
    store, blobs = postgres_server.fresh(), ("--blobs", str(tmp_path / "blobs"))
    with (
        CoordinatorProcess(store, "127.0.0.1:0", *blobs, identity=made.folder) as one,
        CoordinatorProcess(store, "127.0.0.1:0", *blobs, identity=made.folder) as other,
    ):
        text = Invitation.parse(invitation(one))
        barrier, outcomes = threading.Barrier(4), list[Any]()

        def attempt(n: int) -> None:
            there = dataclasses.replace(text, address=(one, other)[n % 2].enrolment)
            barrier.wait()
            try:
                outcomes.append(enroll(there, tmp_path / str(n), f"racer-{n}").certificate.name)
            except Refused as refused:
                outcomes.append(refused.reason)

        threads = [threading.Thread(target=attempt, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        winners = [o for o in outcomes if isinstance(o, str) and o.startswith("racer")]
        assert len(winners) == 1 and outcomes.count(Reason.BAD_TOKEN) == 3
        assert standing(other, winners[0]) == ("frozen", "second_use")


def test_one_certificate_from_two_addresses_at_once_is_flagged_and_goes_on(
    coordinator: CoordinatorProcess, tmp_path: Path
) -> None:
    """All of 127.0.0.0/8 is this machine: a call can come from any of it."""
    identity = enrolled(coordinator, tmp_path, "twice")
    credentials = grpc.ssl_channel_credentials(*identity.tls())
    port = coordinator.address.rpartition(":")[2]

    def call(come_from: str) -> None:
        with socket.create_connection(("127.0.0.1", int(port)), source_address=(come_from, 0)):
            pass  # is the address ours?
        with Through(come_from, coordinator.address) as address:
            target = [("grpc.ssl_target_name_override", "localhost")]
            with grpc.secure_channel(address, credentials, target) as channel:
                method = channel.unary_unary("/edgetune.v1.Federation/CheckIn", pb.CheckInRequest.SerializeToString)
                method(pb.CheckInRequest(device="twice", protocol=1), timeout=5)

    for where in ("127.0.0.2", "127.0.0.2", "127.0.0.3"):
        call(where)
    assert standing(coordinator, "twice") == ("active", "")
    call("127.0.0.2")
    assert standing(coordinator, "twice") == ("active", "two_addresses")
    call("127.0.0.3")  # flagged, not stopped
    assert "two addresses" in edgetune("coordinator", "devices", *coordinator.admin).stdout


class Through:
    """A port whose bytes reach `to` from another address of this machine."""

    def __init__(self, come_from: str, to: str) -> None:
        host, _, port = to.rpartition(":")
        self._from, self._to = come_from, (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=self._serve, daemon=True).start()

    def __enter__(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _serve(self) -> None:
        near, _ = self._listener.accept()
        far = socket.create_connection(self._to, source_address=(self._from, 0))
        back = threading.Thread(target=_pour, args=(far, near), daemon=True)
        back.start()
        _pour(near, far)
        back.join()


def _pour(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 14):
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)


def test_a_flood_on_the_enrolment_port_is_told_to_wait_and_how_long(tmp_path: Path) -> None:
    with identified(tmp_path / "store") as flooded:
        roots = Authority(flooded.identity).certificate.encode()
        with grpc.secure_channel(flooded.enrolment, grpc.ssl_channel_credentials(roots)) as channel:
            stub = pb_grpc.EnrolmentStub(channel)  # type: ignore[no-untyped-call]  # generated code
            codes = list[Any]()
            for _ in range(80):
                try:
                    stub.Authority(pb.AuthorityRequest(), timeout=5)
                except grpc.RpcError as error:
                    codes.append((error.code(), as_ours(error)))
        assert len(codes) >= 10
        assert {code for code, _ in codes} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        assert all(ours.reason is Reason.TOO_OFTEN and 0 < ours.retry_after_s <= 20 for _, ours in codes)
        enrolled(flooded, tmp_path / "d", "patient")  # asks again by itself, and gets in


# Administrators.


def test_a_second_administrator_is_invited_renewed_and_revoked(coordinator: CoordinatorProcess, tmp_path: Path) -> None:
    invited = edgetune("coordinator", "invite", "--administrator", "bea", "--json", *coordinator.admin)
    text = json.loads(invited.stdout)["invitation"]
    done = edgetune("coordinator", "enroll", text, "--name", "bea", "--identity", tmp_path / "bea")
    assert done.returncode == 0, done.stderr
    bea = Identity.read(tmp_path / "bea")
    assert bea.certificate.role == "admin" and bea.certificate.not_after - time.time() < 91 * 86_400
    again = edgetune("coordinator", "enroll", text, "--name", "bea", "--identity", tmp_path / "bea")
    assert again.returncode == 2 and "already" in again.stderr
    with Connection(coordinator.address, identity=bea) as second, administrator(coordinator) as first:
        first_end = bea.certificate.not_after
        time.sleep(1.1)
        bea.certificate = dataclasses.replace(bea.certificate, not_before=0.0)  # half of its life is over
        assert [one.name for one in second.administrators()] == ["bea"]
        assert bea.certificate.not_after > first_end and Identity.read(tmp_path / "bea").certificate == bea.certificate
        assert reason_of(lambda: second.revoke_administrator("bea")) is Reason.BAD_REQUEST
        assert first.revoke_administrator("bea").state == "revoked"
        time.sleep(1.1)
        assert reason_of(second.runs) is Reason.REVOKED
        assert reason_of(lambda: first.invite_administrator("bea", 60.0)) is Reason.NAME_TAKEN


def test_an_administrators_invitation_is_for_its_name_and_its_second_use_revokes(
    coordinator: CoordinatorProcess, tmp_path: Path
) -> None:
    with administrator(coordinator) as admin:
        text = Invitation.parse(admin.invite_administrator("cy", 60.0)[0])
        assert reason_of(lambda: enroll(text, tmp_path / "x", "eve")) is Reason.BAD_TOKEN
        cy = enroll(text, tmp_path / "cy", "cy")
        with Connection(coordinator.address, identity=cy) as second:
            second.runs()
            assert reason_of(lambda: enroll(text, tmp_path / "y", "cy")) is Reason.BAD_TOKEN
            time.sleep(1.1)
            assert reason_of(second.runs) is Reason.REVOKED


def test_the_first_administrator_can_be_revoked_by_another(tmp_path: Path) -> None:
    with identified(tmp_path / "store") as coordinator, administrator(coordinator) as first:
        bea = enroll(Invitation.parse(first.invite_administrator("bea", 60.0)[0]), tmp_path / "bea", "bea")
        with Connection(coordinator.address, identity=bea) as second:
            assert second.revoke_administrator("admin").state == "revoked"
            time.sleep(1.1)
            assert reason_of(first.runs) is Reason.REVOKED
            assert second.runs() == []


def test_an_expired_token_and_an_invented_one_are_refused(coordinator: CoordinatorProcess, tmp_path: Path) -> None:
    expired = Invitation.parse(invitation(coordinator, s=0.001))
    invented = dataclasses.replace(expired, token=bytes(16))
    for bad in (expired, invented):
        with pytest.raises(Refused) as caught:
            enroll(bad, tmp_path, "late")
        assert caught.value.reason is Reason.BAD_TOKEN


def test_the_quota_of_an_owner_counts_its_devices(coordinator: CoordinatorProcess, tmp_path: Path) -> None:
    texts = [Invitation.parse(invitation(coordinator, "bob", quota)) for quota in (1, None)]
    enroll(texts[0], tmp_path / "1", "bob-1")
    assert reason_of(lambda: enroll(texts[1], tmp_path / "2", "bob-2")) is Reason.QUOTA
    invitation(coordinator, "bob", 2)
    enroll(texts[1], tmp_path / "2", "bob-2")  # the refusal did not use the token up


def test_a_revoked_name_is_not_enrolled_again(coordinator: CoordinatorProcess, tmp_path: Path) -> None:
    enrolled(coordinator, tmp_path, "banned")
    with administrator(coordinator) as admin:
        assert admin.revoke("banned").state == "revoked"
    assert reason_of(lambda: enrolled(coordinator, tmp_path, "banned")) is Reason.REVOKED


def test_an_invitation_of_another_coordinator_is_noticed_before_the_token_is_sent(
    coordinator: CoordinatorProcess, tmp_path: Path
) -> None:
    text = Invitation.parse(invitation(coordinator))
    with pytest.raises(IdentityError, match="nothing was sent"):
        enroll(dataclasses.replace(text, authority=bytes(32)), tmp_path / "d", "careful")
    assert not (tmp_path / "d").exists()
    enroll(text, tmp_path / "d", "careful")


@pytest.mark.parametrize(
    ("owner", "quota", "lifetime_s"),
    [("Bad Name", None, 60.0), ("ann", 0, 60.0), ("ann", None, 90_000.0), ("ann", None, 0)],
)
def test_an_invitation_that_cannot_be_is_refused(
    coordinator: CoordinatorProcess, owner: str, quota: int | None, lifetime_s: float
) -> None:
    assert reason_of(lambda: invitation(coordinator, owner, quota, lifetime_s)) is Reason.BAD_REQUEST


def test_only_the_hash_of_a_token_is_kept(coordinator: CoordinatorProcess) -> None:
    text = invitation(coordinator)
    ledger = b"".join(path.read_bytes() for path in Path(coordinator.store).glob("ledger.sqlite*"))
    secret = Invitation.parse(text).token
    assert secret not in ledger and secret.hex().encode() not in ledger
    assert text.rpartition("/")[2].encode() not in ledger


def test_devices_are_listed_with_their_owner_and_state(coordinator: CoordinatorProcess, tmp_path: Path) -> None:
    enrolled(coordinator, tmp_path, "listed", owner="carol")
    with administrator(coordinator) as admin:
        found = {device.name: device for device in admin.devices()}["listed"]
    assert (found.owner, found.state) == ("carol", "active")
    assert found.certificate_ends_at - time.time() == pytest.approx(7 * 86_400, abs=60)


# Revocation.


def test_a_held_check_in_ends_within_five_seconds_of_the_revocation(
    coordinator: CoordinatorProcess, devices: dict[str, Identity], tmp_path: Path
) -> None:
    identity = enrolled(coordinator, tmp_path, "held")
    with (
        administrator(coordinator) as admin,
        Connection(coordinator.address, identity=devices["d1"]) as first,
        Connection(coordinator.address, identity=identity) as held,
    ):
        created_run(admin, "held-run")
        assert isinstance(first.check_in("d1", ("held-run",), 1.0), Task)  # the only place
        timer = threading.Timer(0.5, admin.revoke, ["held"])
        timer.start()
        began = time.monotonic()
        assert reason_of(lambda: held.check_in("held", ("held-run",), 30.0)) is Reason.REVOKED
        assert 0.4 < time.monotonic() - began < 5.5
        timer.join()
        assert reason_of(lambda: held.describe("held-run")) is Reason.REVOKED


def test_a_device_with_too_many_calls_open_is_busy_and_another_is_not(
    coordinator: CoordinatorProcess, devices: dict[str, Identity], tmp_path: Path
) -> None:
    greedy = grpc.ssl_channel_credentials(*enrolled(coordinator, tmp_path, "greedy").tls())
    with administrator(coordinator) as admin, Connection(coordinator.address, identity=devices["d1"]) as other:
        created_run(admin, "calm", cohort={"goal": 1, "minimum": 1})
        assert isinstance(other.check_in("d1", ("calm",), 1.0), Task)  # the only place
        ask = pb.CheckInRequest(device="greedy", runs=["calm"], protocol=PROTOCOL, wait_s=20.0)
        with grpc.secure_channel(coordinator.address, greedy) as channel:
            check_in = pb_grpc.FederationStub(channel).CheckIn  # type: ignore[no-untyped-call]
            held = [check_in.future(ask, timeout=30) for _ in range(MOST_OPEN)]
            time.sleep(2.0)
            assert not any(call.done() for call in held)
            with pytest.raises(grpc.RpcError) as caught:
                check_in(ask, timeout=5)
            assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert isinstance(other.check_in("d1", ("calm",), 0.0), Task)


def created_run(admin: Connection, name: str, **changes: Any) -> Any:

    run = make(name, **changes)
    admin.create_run(run, LAYOUT, np.zeros(LAYOUT.size, np.float32))
    return run


def test_a_stalled_upload_ends_within_five_seconds_of_the_revocation(
    coordinator: CoordinatorProcess, tmp_path: Path
) -> None:
    identity = enrolled(coordinator, tmp_path, "stalled")
    stop = threading.Event()

    def chunks() -> Iterator[pb.UploadChunk]:
        yield pb.UploadChunk(digest="a" * 64, size=1 << 20, data=b"x")
        stop.wait(20)

    credentials = grpc.ssl_channel_credentials(*identity.tls())
    with administrator(coordinator) as admin, grpc.secure_channel(coordinator.address, credentials) as channel:
        call = channel.stream_unary("/edgetune.v1.Federation/Upload", pb.UploadChunk.SerializeToString, bytes)
        threading.Timer(0.5, lambda: admin.revoke("stalled")).start()
        began = time.monotonic()
        with pytest.raises(grpc.RpcError) as caught:
            call(chunks(), timeout=15)
        assert time.monotonic() - began < 5.5
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
        stop.set()
    assert list(Path(coordinator.store).glob("blobs/aside/*")) == []


def test_a_release_that_nobody_reads_on_ends_with_the_revocation(
    coordinator: CoordinatorProcess, tmp_path: Path
) -> None:
    identity = enrolled(coordinator, tmp_path, "slow")
    credentials = grpc.ssl_channel_credentials(*identity.tls())
    narrow = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 64 << 10)]
    with administrator(coordinator) as admin, grpc.secure_channel(coordinator.address, credentials, narrow) as channel:
        admin.create_run(make("long"), BIG, np.zeros(BIG.size, np.float32))
        call = channel.unary_stream(
            "/edgetune.v1.Federation/FetchRelease", pb.FetchReleaseRequest.SerializeToString, bytes
        )
        stream = call(pb.FetchReleaseRequest(run="long"), timeout=20)
        received = len(next(stream))
        admin.revoke("slow")
        time.sleep(4.0)
        with pytest.raises(grpc.RpcError) as caught:
            received += sum(len(chunk) for chunk in stream)
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert received < 4 * BIG.size


def test_what_a_revoked_device_gave_to_an_open_round_is_taken_out(
    coordinator: CoordinatorProcess, tmp_path: Path
) -> None:
    identities = {name: enrolled(coordinator, tmp_path / name, name) for name in ("good", "bad")}
    with administrator(coordinator) as admin:
        run = created_run(admin, "cleaned", cohort={"goal": 2})
        for name in ("bad", "good"):
            with Connection(coordinator.address, identity=identities[name]) as device:
                task = device.check_in(name, ("cleaned",), 1.0)
                assert isinstance(task, Task)
                if name == "bad":
                    contribution, payload = update(run, task)
                    device.send(dataclasses.replace(contribution, device=name), payload)
        assert admin.status("cleaned").accepted == 1
        admin.revoke("bad")
        status = admin.status("cleaned")
        assert (status.accepted, status.offered) == (0, 1)


def test_revoking_whom_nobody_knows_is_said(coordinator: CoordinatorProcess) -> None:
    with administrator(coordinator) as admin:
        assert reason_of(lambda: admin.revoke("nobody")) is Reason.UNKNOWN_DEVICE


# Without identities.


def test_a_coordinator_without_identities_refuses_their_calls_by_name(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "store") as plain, Connection(plain.address) as connection:
        for call in (
            lambda: connection.invite("ann", None, 60.0),
            connection.devices,
            lambda: connection.revoke("d"),
            lambda: created(connection, "shared", cohort={"goal": 1, "owner_share": 0.5}),
        ):
            assert reason_of(call) is Reason.NO_IDENTITIES


def test_beyond_this_machine_it_listens_with_identities_or_not_at_all(tmp_path: Path) -> None:
    refused = edgetune("coordinator", "serve", "--store", tmp_path / "s", "--listen", "0.0.0.0:0")
    assert refused.returncode == 2 and "coordinator init" in refused.stderr and "--insecure" in refused.stderr
    assert not (tmp_path / "s").exists()
    with CoordinatorProcess(tmp_path / "s", "0.0.0.0:0", "--insecure") as open_to_all:
        port = open_to_all.address.rpartition(":")[2]
        with Connection(f"127.0.0.1:{port}") as connection:
            assert connection.runs() == []


def test_a_second_init_changes_nothing(tmp_path: Path) -> None:
    first = edgetune("coordinator", "init", "--dir", tmp_path / "i", "--host", "fl.example.org")
    assert first.returncode == 0 and "fl.example.org" in first.stdout
    before = {path: path.read_bytes() for path in (tmp_path / "i").rglob("*") if path.is_file()}
    second = edgetune("coordinator", "init", "--dir", tmp_path / "i")
    assert second.returncode == 2 and "nothing was changed" in second.stderr
    assert before == {path: path.read_bytes() for path in (tmp_path / "i").rglob("*") if path.is_file()}
    assert all(path.stat().st_mode & 0o077 == 0 for path in before)


def test_a_running_coordinator_answers_with_the_renewed_certificate(tmp_path: Path) -> None:
    made = authority.create(tmp_path, ["localhost", "127.0.0.1"])

    async def shown() -> tuple[str, str]:
        server = grpc.aio.server()
        port = server.add_secure_port("127.0.0.1:0", serve._credentials(made, for_anyone=False))
        await server.start()
        first = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port))
        made._renew_server_at = time.time() - 1
        second = await asyncio.to_thread(ssl.get_server_certificate, ("127.0.0.1", port))
        await server.stop(0)
        return first, second

    first, second = asyncio.run(shown())
    assert first != second and all(certificates.is_issued_by(pem, made.certificate) for pem in (first, second))


def test_a_revocation_holds_on_every_replica_within_five_seconds(tmp_path: Path, postgres_server: Any) -> None:
    made = authority.create(tmp_path / "keys", ["localhost", "127.0.0.1"])
    more = ("--blobs", str(tmp_path / "blobs"), "--replicas", "2")
    with CoordinatorProcess(postgres_server.fresh(), "127.0.0.1:0", *more, identity=made.folder) as coordinator:
        assert coordinator.enrolment != coordinator.address and len(coordinator.replicas) == 2
        identity = enrolled(coordinator, tmp_path / "d", "d")
        for n in range(6):  # whichever replicas answer its calls
            enrolled(coordinator, tmp_path / f"d{n}", f"d{n}")
        for _ in range(8):
            with Connection(coordinator.address, identity=identity) as connection:
                connection.check_in("d", (), 0.0)
        with administrator(coordinator) as admin:
            admin.revoke("d")
        time.sleep(5)
        for _ in range(8):
            with Connection(coordinator.address, identity=identity) as connection, pytest.raises(Refused) as caught:
                connection.check_in("d", (), 0.0)
            assert caught.value.reason is Reason.REVOKED


def test_an_invitation_names_the_host_that_init_was_given(tmp_path: Path) -> None:
    authority.create(tmp_path / "store" / "identity", ["fl.example.org", "127.0.0.1"])
    with CoordinatorProcess(tmp_path / "store", "0.0.0.0:0") as coordinator:
        port = coordinator.address.rpartition(":")[2]
        identity = Identity.read(tmp_path / "store" / "identity" / "admin")
        with Connection(f"127.0.0.1:{port}", identity=identity) as admin:
            address = Invitation.parse(admin.invite("ann", None, 60.0)[0]).address
    assert address == f"fl.example.org:{coordinator.enrolment.rpartition(':')[2]}"


def test_the_servers_certificate_is_renewed_in_the_second_half_of_its_life(tmp_path: Path) -> None:
    made = authority.create(tmp_path / "i", ["localhost"])
    first = made.server()
    assert made.server() == first
    made._renew_server_at = time.time() - 1
    second = made.server()
    assert second != first and certificates.is_issued_by(second[1], made.certificate)
    assert Authority(tmp_path / "i").server() not in (first, second)  # each process has a pair of its own


def test_long_work_goes_on_while_nobody_is_there_to_renew_and_the_next_call_says_so(tmp_path: Path) -> None:
    with identified(tmp_path / "store", "--certificates", "3s") as coordinator:
        identity = enrolled(coordinator, tmp_path / "d", "d")
        connection = Connection(coordinator.address, identity=identity)
    time.sleep(1.6)
    began = time.monotonic()
    for _ in range(1000):  # as between training steps
        connection.keep_current()
    assert time.monotonic() - began < 5
    time.sleep(1.5)
    connection.keep_current()
    with connection, pytest.raises(IdentityError, match="new invitation"):
        connection.check_in("d", (), 0.0)


def test_a_certificate_in_its_second_half_is_renewed_by_the_next_call(tmp_path: Path) -> None:
    with identified(tmp_path / "store", "--certificates", "4s") as coordinator:
        identity = enrolled(coordinator, tmp_path / "d", "d")
        first = identity.certificate
        with Connection(coordinator.address, identity=identity) as connection:
            connection.check_in("d", (), 0.0)
            assert identity.certificate == first
            time.sleep(2.1)
            connection.check_in("d", (), 0.0)
        assert identity.certificate.not_after > first.not_after
        assert Identity.read(tmp_path / "d").certificate == identity.certificate
