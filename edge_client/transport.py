"""The client's side of the protocol: the only file here that imports grpc. Every call has a deadline and gives up aloud.

What follows from an error is `wire.contract`'s to say. Calls that may be repeated are: an unreachable or busy coordinator
is asked again with growing, jittered pauses, until `patience_s` has passed without progress. A first contact is not waited
for: a wrong address should be said at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import grpc
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from protos.v1 import federation_pb2 as pb
from protos.v1 import federation_pb2_grpc as pb_grpc
from wire import run_spec, spec
from wire.contract import DOMAIN, Action, after
from wire.delta import Layout, Vector
from wire.errors import IdentityError, PayloadError, Reason, Refused, RemoteError, Unreachable
from wire.identity import Invitation, host_of
from wire.messages import (
    ACTIONS,
    CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    PART_BYTES,
    PROTOCOL,
    Contribution,
    Control,
    DeviceStanding,
    Finished,
    Receipt,
    ReleaseManifest,
    RunStatus,
    Task,
    Wait,
)
from wire.run_spec import RunSpec

if TYPE_CHECKING:  # it needs a cryptographic library, which a client without identity does not have
    from edge_client.identity import Identity

T = TypeVar("T")
CALL_S = 30.0
PART_S = 90.0
"""Deadline of one part of an upload: longer than a coordinator waits for a slow one."""
TRANSFER_S = 3600.0
"""Deadline of a stream of chunks: 20 MB in an hour is the slowest link that is served."""
FIRST_CONTACT_S = 5.0
RENEW_S = 10.0
RENEW_AGAIN_S = 60.0
"""Between two tries to renew a certificate: training goes on meanwhile."""
FRAME_BYTES = 5
"""gRPC puts a flag and a length before every message."""
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.keepalive_time_ms", 60_000),
]
QUICK_S = 1.0
"""A link that took no longer for a part may have parts of twice the size: each costs the coordinator a sync."""
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0

ASK_AGAIN = frozenset({Action.RETRY})
SEND_AGAIN = frozenset({Action.RETRY, Action.RESUME})
"""The actions after which a call is made again, and bytes are sent from where they have come to."""
Progress = Callable[[int, int], None]
"""Told of an upload how many bytes are durable, of how many."""


@dataclasses.dataclass(frozen=True, eq=False)
class Fetched:
    """A release as it came: `data` is an adapter, or steps or coded deltas of `sizes` bytes. Nothing is checked but the length."""

    release: ReleaseManifest
    data: memoryview
    sizes: tuple[int, ...]

    @property
    def links(self) -> list[memoryview]:
        """The steps or coded deltas, oldest first; none where the data are an adapter."""
        ends = list(itertools.accumulate(self.sizes))
        return [self.data[end - size : end] for size, end in zip(self.sizes, ends, strict=True)]


class Connection:
    """One coordinator. `sent` and `received` count message bytes with their gRPC frames, both ways, for ever."""

    def __init__(self, address: str, patience_s: float = 300.0, identity: Identity | None = None) -> None:
        self.address, self.sent, self.received = address, 0, 0
        self._patience_s, self._met = patience_s, False
        self._identity, self._renew_at = identity, 0.0
        if identity is not None:
            identity.check_window()
        self._channel = _channel(address, identity)

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    @property
    def _devices(self) -> Any:
        self.keep_current()
        return pb_grpc.FederationStub(self._channel)  # type: ignore[no-untyped-call]  # generated code

    @property
    def _people(self) -> Any:
        return pb_grpc.AdministrationStub(self._channel)  # type: ignore[no-untyped-call]  # generated code

    def keep_current(self) -> None:
        """Renew the own certificate if half of its life is over; long work calls this now and then.

        A coordinator that cannot be reached is asked again later, and work goes on: it is the next call that needs the
        certificate, and says so where it has ended.
        """
        if self._identity is None or not self._identity.is_due() or time.monotonic() < self._renew_at:
            return
        self._renew_at = time.monotonic() + RENEW_AGAIN_S
        stub = pb_grpc.EnrolmentStub(self._channel)  # type: ignore[no-untyped-call]  # generated code
        try:
            reply = stub.Renew(pb.RenewRequest(), timeout=RENEW_S)
        except grpc.RpcError:
            return
        self._renew_at = 0.0
        self._identity.renewed(reply.certificate_pem)
        self._channel.close()
        self._channel = _channel(self.address, self._identity)

    def greet(self) -> None:
        """Ask for nothing but an answer. Raises Unreachable."""
        # needed here alone: clients on small machines count megabytes
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        self._unary(health_pb2_grpc.HealthStub(self._channel).Check, health_pb2.HealthCheckRequest())

    # What devices call.

    def check_in(self, device: str, runs: tuple[str, ...], wait_s: float) -> Task | Wait | Finished:
        """A task, or none after `wait_s`, or the word that every run asked for has ended."""
        request = pb.CheckInRequest(device=device, runs=runs, wait_s=wait_s, protocol=PROTOCOL)
        reply = self._unary(self._devices.CheckIn, request, CALL_S + wait_s)
        match reply.WhichOneof("answer"):
            case "task":
                return Task.from_proto(reply.task)
            case "finished":
                return Finished(tuple(reply.finished.runs))
            case _:
                return Wait(reply.wait.retry_after_s, reply.wait.active_runs)

    def describe(self, run: str) -> tuple[RunSpec, Layout]:
        """A run's spec and layout, checked."""
        reply = self._unary(self._devices.DescribeRun, pb.GetRunRequest(run=run))
        if self._identity is not None:
            self._identity.check_release_key(reply.release_key)
        return run_spec.parse(json.loads(reply.spec_json)), Layout.parse(json.loads(reply.layout_json))

    def release(self, run: str, limit: int, version: int | None, steps_after: int | None = None) -> Fetched:
        """A release (None: the newest) and at most `limit` bytes of it: its adapter, or what leads there from `steps_after`.

        With an identity, raises PayloadError for a release without the coordinator's signature."""
        request = pb.FetchReleaseRequest(run=run, version=version or 0, latest=version is None, steps_after=steps_after)
        return self._again(lambda: self._read_release(request, limit))

    def send(self, contribution: Contribution, payload: bytes, progress: Progress = lambda sent, size: None) -> Receipt:
        """Send an update and get its receipt. Small ones in one call, large ones in parts, going on where they were.

        Raises Refused for a no, Unreachable or RemoteError when patience ends; the caller keeps what it wrote down.
        """
        if len(payload) > CHUNK_BYTES:
            return self._upload(contribution.to_proto(), memoryview(payload), progress)
        request = pb.SubmitRequest(contribution=contribution.to_proto(), payload=payload)
        return Receipt.from_proto(self._again(lambda: self._call(self._devices.Submit, request), SEND_AGAIN))

    def _upload(self, mine: pb.Contribution, payload: memoryview, progress: Progress) -> Receipt:
        """Whatever breaks, ask how far the upload is and send the rest. Each durable byte renews patience."""
        patience, reached = self._patience(), 0
        while True:
            self._check_window()
            try:
                state = self._call(self._devices.CreateUpload, mine)
                if state.HasField("receipt"):
                    return Receipt.from_proto(state.receipt)
                if state.offset > reached:
                    patience, reached = self._patience(), state.offset
                self._send_rest(state, mine.device, payload, progress)
                return Receipt.from_proto(self._call(self._devices.Commit, mine, TRANSFER_S))
            except grpc.RpcError as error:
                patience.pause(_as_ours(error), SEND_AGAIN)

    def _send_rest(self, state: pb.UploadState, device: str, payload: memoryview, progress: Progress) -> None:
        offset, size, step = state.offset, len(payload), PART_BYTES
        progress(offset, size)
        while offset < size:
            data, began = bytes(payload[offset : offset + step]), time.monotonic()
            part = pb.UploadPart(
                upload=state.upload, device=device, offset=offset, digest=spec.bytes_digest(data), data=data
            )
            offset = self._append(part).offset
            step = 2 * PART_BYTES if time.monotonic() - began < QUICK_S else PART_BYTES
            progress(offset, size)

    def _append(self, part: pb.UploadPart) -> pb.UploadState:
        self.sent += part.ByteSize() + FRAME_BYTES
        state: pb.UploadState = self._devices.AppendUpload(iter([part]), timeout=PART_S)
        self.received += state.ByteSize() + FRAME_BYTES
        if state.offset != part.offset + len(part.data):
            raise PayloadError(Reason.BAD_REQUEST, f"the coordinator took a part and says offset {state.offset}")
        return state

    def upload(self, data: bytes | memoryview) -> str:
        """Store bytes that are no update with the coordinator, in one stream; their digest."""
        digest = spec.bytes_digest(data)

        def attempt() -> str:
            reply = self._devices.Upload(self._counted(_cut(data, digest)), timeout=TRANSFER_S)
            return str(reply.digest)

        return self._again(attempt, SEND_AGAIN)

    def leave(self, device: str, task: Task) -> None:
        """Give a task back. Asked once: a coordinator that is not there will notice at the deadline."""
        request = pb.LeaveRequest(device=device, run=task.run, round=task.round, attempt=task.attempt)
        try:
            self._devices.Leave(request, timeout=2.0)
        except (grpc.RpcError, IdentityError):
            return

    # What people who administer runs call.

    def create_run(self, created: RunSpec, layout: Layout, adapter: Vector) -> RunStatus:
        """Upload the initial adapter, float32 [layout.size], and open the run."""
        digest = self.upload(memoryview(adapter.astype("<f4").data).cast("B"))
        request = pb.CreateRunRequest(
            spec_json=spec.canonical(created).decode(),
            layout_json=spec.canonical(layout).decode(),
            adapter_digest=digest,
        )
        return RunStatus.from_proto(self._unary(self._people.CreateRun, request))

    def status(self, run: str) -> RunStatus:
        return RunStatus.from_proto(self._unary(self._people.GetRun, pb.GetRunRequest(run=run)))

    def control(self, run: str, action: Control, reason: str = "") -> RunStatus:
        """Pause, resume or stop a run; the reason is shown with its state."""
        number = next(number for number, name in ACTIONS.items() if name == action)
        request = pb.ControlRunRequest(run=run, action=pb.RunAction.Name(number), reason=reason)
        return RunStatus.from_proto(self._unary(self._people.ControlRun, request))

    def runs(self) -> list[RunStatus]:
        reply = self._unary(self._people.ListRuns, pb.ListRunsRequest())
        return [RunStatus.from_proto(status) for status in reply.runs]

    def invite(self, owner: str, quota: int | None, lifetime_s: float) -> tuple[str, float]:
        """A new invitation, and when it expires in Unix seconds."""
        request = pb.InviteRequest(owner=owner, quota=quota, lifetime_s=lifetime_s)
        reply = self._unary(self._people.Invite, request)
        return str(reply.invitation), float(reply.expires_at)

    def devices(self) -> list[DeviceStanding]:
        reply = self._unary(self._people.ListDevices, pb.ListDevicesRequest())
        return [DeviceStanding.from_proto(device) for device in reply.devices]

    def revoke(self, device: str) -> DeviceStanding:
        return DeviceStanding.from_proto(self._unary(self._people.Revoke, pb.RevokeRequest(device=device)))

    def watch(self, run: str) -> Iterator[RunStatus]:
        """The status now and after each change, until the run has ended."""
        while True:
            for status in self._again(lambda: self._watching(run)):
                yield status
                if status.ended:
                    return

    def _watching(self, run: str) -> Iterator[RunStatus]:
        """A stream that has already answered once, so that refusals are raised here and not while it is read."""
        stream = self._people.WatchRun(pb.GetRunRequest(run=run), timeout=TRANSFER_S)
        first = next(stream)

        def rest() -> Iterator[RunStatus]:
            yield RunStatus.from_proto(first)
            try:
                for message in stream:
                    yield RunStatus.from_proto(message)
            except grpc.RpcError as error:
                if after(ours := _as_ours(error)) is not Action.RETRY:
                    raise ours from error

        return rest()

    def _read_release(self, request: pb.FetchReleaseRequest, limit: int) -> Fetched:
        manifest: ReleaseManifest | None = None
        sizes: tuple[int, ...] = ()
        data = bytearray()
        for chunk in self._devices.FetchRelease(request, timeout=TRANSFER_S):
            self.received += chunk.ByteSize() + FRAME_BYTES
            if manifest is None:
                manifest, sizes = ReleaseManifest.parse(chunk.release.manifest_json), tuple(chunk.step_bytes)
                if self._identity is not None:
                    self._identity.check_release(manifest, chunk.release.signature)
            if len(data) + len(chunk.data) > limit:
                raise PayloadError(Reason.BAD_SIZE, f"a release is longer than the {limit} bytes it can have")
            data += chunk.data
        if manifest is None or (sizes and sum(sizes) != len(data)):
            raise PayloadError(Reason.BAD_SIZE, "a release arrived cut off")
        return Fetched(manifest, memoryview(data), sizes)

    def _counted(self, chunks: Iterator[pb.UploadChunk]) -> Iterator[pb.UploadChunk]:
        for chunk in chunks:
            self.sent += chunk.ByteSize() + FRAME_BYTES
            yield chunk

    def _unary(self, method: Any, request: Any, timeout_s: float = CALL_S) -> Any:
        return self._again(lambda: self._call(method, request, timeout_s))

    def _call(self, method: Any, request: Any, timeout_s: float = CALL_S) -> Any:
        self.sent += request.ByteSize() + FRAME_BYTES
        reply = method(request, timeout=timeout_s)
        self.received += reply.ByteSize() + FRAME_BYTES
        self._met = True
        return reply

    def _again(self, attempt: Callable[[], T], after_which: frozenset[Action] = ASK_AGAIN) -> T:
        """Repeat what may be repeated. Raises Unreachable when patience ends, Refused for a no, RemoteError otherwise."""
        patience = self._patience()
        while True:
            self._check_window()
            try:
                result = attempt()
                self._met = True
                return result
            except grpc.RpcError as error:
                patience.pause(_as_ours(error), after_which)

    def _check_window(self) -> None:
        """Raises IdentityError where the certificate has ended: gRPC would say only that nobody answers."""
        if self._identity is not None:
            self._identity.check_window()

    def _patience(self) -> _Patience:
        seconds = self._patience_s if self._met else FIRST_CONTACT_S
        return _Patience(self.address, seconds, self._identity is None)


class _Patience:
    """How long one thing is tried: pauses that grow and are jittered, none shorter than the coordinator asks for."""

    def __init__(self, address: str, seconds: float, plain: bool) -> None:
        self._address, self._plain = address, plain
        self._give_up, self._pause_s = time.monotonic() + seconds, FIRST_PAUSE_S

    def pause(self, error: RemoteError, after_which: frozenset[Action]) -> None:
        """Until it is time to try again. Raises `error` if that is no use, or in the words of a caller who gives up."""
        if after(error) not in after_which:
            raise error
        asked_s = (error.retry_after_s or 0.0) if isinstance(error, Refused) else 0.0
        pause_s = max(random.uniform(0.5, 1.0) * self._pause_s, random.uniform(1.0, 2.0) * asked_s)  # jitter, no secret
        if time.monotonic() + pause_s > self._give_up:
            raise self._gave_up(error) from error
        time.sleep(pause_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _gave_up(self, last: RemoteError) -> RemoteError:
        if isinstance(last, Refused):
            return last
        return Unreachable(_nobody(self._address, last, self._plain))


def _nobody(address: str, last: object, plain: bool) -> str:
    hint = " Or it has identities, and this call was made without one." if plain else ""
    return f"no coordinator answers at {address}: is it running, is the address right?{hint} ({last})"


def _channel(address: str, identity: Identity | None) -> grpc.Channel:
    if identity is None:
        return grpc.insecure_channel(address, options=OPTIONS)
    authority, key, certificate = identity.tls()
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, key, certificate), options=OPTIONS)


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
    import ssl  # needed here alone, as in `greet`

    host, port = host_of(invitation.address), int(invitation.address.rpartition(":")[2])
    try:
        shown = ssl.get_server_certificate((host, port), timeout=FIRST_CONTACT_S).encode()
    except (OSError, ValueError) as error:
        raise Unreachable(_nobody(invitation.address, error, plain=False)) from error
    message = pb.EnrollRequest(token=invitation.token, device=device)
    authority = str(_ask(invitation.address, shown, "Authority", pb.AuthorityRequest()).certificate_pem)
    trust(authority)
    message.request_pem = request()
    reply = _ask(invitation.address, authority.encode(), "Enroll", message)
    return authority, Enrolled(reply.certificate_pem, reply.release_key, reply.port)


def _ask(address: str, believed: bytes, method: str, message: Any) -> Any:
    with grpc.secure_channel(address, grpc.ssl_channel_credentials(believed), options=OPTIONS) as channel:
        stub = pb_grpc.EnrolmentStub(channel)  # type: ignore[no-untyped-call]  # generated code
        try:
            return getattr(stub, method)(message, timeout=CALL_S)
        except grpc.RpcError as error:
            ours = _as_ours(error)
            raise ours if isinstance(ours, Refused) else Unreachable(_nobody(address, ours, plain=False)) from error


def _cut(data: bytes | memoryview, digest: str) -> Iterator[pb.UploadChunk]:
    view = memoryview(data)
    yield pb.UploadChunk(digest=digest, size=len(view), data=bytes(view[:CHUNK_BYTES]))
    for start in range(CHUNK_BYTES, len(view), CHUNK_BYTES):
        yield pb.UploadChunk(data=bytes(view[start : start + CHUNK_BYTES]))


def _as_ours(error: grpc.RpcError) -> RemoteError:
    """The error that a status carries: Refused if it names one of our reasons."""
    status = rpc_status.from_call(error)
    details = status.details if status is not None else ()
    info = _detail(details, error_details_pb2.ErrorInfo())
    if info is None or info.domain != DOMAIN or info.reason not in Reason.__members__:
        return RemoteError(f"{error.code().name}: {error.details()}", error.code().name)
    retry = _detail(details, error_details_pb2.RetryInfo())
    retry_after_s = None if retry is None else retry.retry_delay.ToTimedelta().total_seconds()
    return Refused(Reason[info.reason], str(error.details()), retry_after_s)


def _detail(details: Iterable[Any], wanted: T) -> T | None:
    """The first detail of the type of `wanted`, which it is read into."""
    return next((wanted for detail in details if detail.Unpack(wanted)), None)
