"""How calls to a coordinator are made: its channel, deadlines, patience, and errors in our words. Every call has a deadline and
gives up aloud.

What follows from an error is `wire.contract`'s to say. Calls that may be repeated are: an unreachable or busy coordinator
is asked again with growing, jittered pauses, until `patience_s` has passed without progress. A first contact is waited for only
by who can say so meanwhile, and only where nobody listens yet: whatever else is wrong there should be said at once.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

import grpc

from protos.v1 import federation_pb2 as pb
from protos.v1 import federation_pb2_grpc as pb_grpc
from wire.contract import DOMAIN, Action, after
from wire.errors import Reason, Refused, RemoteError, Unreachable
from wire.messages import MAX_MESSAGE_BYTES

if TYPE_CHECKING:  # it needs a cryptographic library, which a client without identity does not have
    from edge_client.identity import Identity

T = TypeVar("T")
Tell = Callable[[str, dict[str, Any]], None]
"""Told what happens, by name, with plain values: what progress bars and `--json` show."""
CALL_S = 30.0
SLOWEST_BYTES_PER_S = 5_500
"""The slowest link that is served: 20 MB in an hour."""
WATCH_S = 3600.0
FIRST_CONTACT_S = 5.0
AWAY_S = 3.0
"""A coordinator that is replaced is back by then: who has waited longer says so."""
NOBODY_LISTENS = ("Failed to connect to remote host", "DEADLINE_EXCEEDED")
"""What gRPC says of an address where nothing answers; not of a name that is none, a foreign certificate, another protocol."""
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
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.2, 10.0

ASK_AGAIN = frozenset({Action.RETRY})
SEND_AGAIN = frozenset({Action.RETRY, Action.RESUME})
"""The actions after which a call is made again, and bytes are sent from where they have come to."""


def transfer_s(size: int) -> float:
    """Deadline of a call that carries `size` bytes: what is lost on the way is noticed as soon as even the slowest link would
    have done."""
    return CALL_S + size / SLOWEST_BYTES_PER_S


class Calls:
    """One coordinator. `sent` and `received` count message bytes with their gRPC frames, both ways, for ever.

    `attended`: a person waits for the answers, and hears at once of a disk without room, which somebody has to make.
    `tell` hears where a coordinator is away; with it a first contact is waited for.
    """

    def __init__(
        self,
        address: str,
        patience_s: float = 300.0,
        identity: Identity | None = None,
        attended: bool = False,
        tell: Tell | None = None,
    ) -> None:
        self.address, self.sent, self.received, self._tell = address, 0, 0, tell
        self._patience_s, self._met, self._attended = patience_s, False, attended
        self._identity, self._renew_at = identity, 0.0
        if identity is not None:
            identity.check_window()
        self._channel = channel_to(address, identity)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._channel.close()

    @property
    def _devices(self) -> Any:
        self.keep_current()
        return pb_grpc.FederationStub(self._channel)  # type: ignore[no-untyped-call]  # generated code

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
        self._channel = channel_to(self.address, self._identity)

    def greet(self) -> None:
        """Ask for nothing but an answer. Raises Unreachable."""
        # needed here alone: clients on small machines count megabytes
        from grpc_health.v1 import health_pb2, health_pb2_grpc

        self._unary(health_pb2_grpc.HealthStub(self._channel).Check, health_pb2.HealthCheckRequest())

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
                patience.pause(as_ours(error), after_which)

    def _check_window(self) -> None:
        """Raises IdentityError where the certificate has ended: gRPC would say only that nobody answers."""
        if self._identity is not None:
            self._identity.check_window()

    def _patience(self) -> Patience:
        plain, first_s = self._identity is None, None if self._met else FIRST_CONTACT_S
        seconds = self._patience_s if self._met or self._tell else FIRST_CONTACT_S
        return Patience(self.address, seconds, plain, self._attended, first_s, self._tell)


class Patience:
    """How long one thing is tried: pauses that grow and are jittered, none shorter than the coordinator asks for.

    With `first_s` it is a first contact, and what is wrong there is tried for so long only, unless it is that nobody listens.
    """

    def __init__(
        self,
        address: str,
        seconds: float,
        plain: bool,
        attended: bool = False,
        first_s: float | None = None,
        tell: Tell | None = None,
    ) -> None:
        self._address, self._plain, self._attended, self._tell = address, plain, attended, tell
        self._began, self._pause_s = time.monotonic(), FIRST_PAUSE_S
        self._seconds, self._first_s = seconds, seconds if first_s is None else first_s

    def pause(self, error: RemoteError, after_which: frozenset[Action]) -> None:
        """Until it is time to try again. Raises `error` if that is no use, or in the words of a caller who gives up."""
        if after(error) not in after_which or (self._attended and _is_full(error)):
            raise error
        asked_s = (error.retry_after_s or 0.0) if isinstance(error, Refused) else 0.0
        pause_s = max(random.uniform(0.5, 1.0) * self._pause_s, random.uniform(1.0, 2.0) * asked_s)  # jitter, no secret
        gone_s = time.monotonic() - self._began
        if gone_s + pause_s > (self._seconds if _may_come(error) else self._first_s):
            raise self._gave_up(error) from error
        if gone_s + pause_s > AWAY_S and self._tell is not None:
            self._tell("away", {"address": self._address, "detail": str(error)})
            self._tell = None  # once
        time.sleep(pause_s)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)

    def _gave_up(self, last: RemoteError) -> RemoteError:
        if isinstance(last, Refused):
            return last
        return Unreachable(nobody(self._address, last, self._plain))


def _may_come(error: RemoteError) -> bool:
    """Whether all that is wrong at a first contact may be that it comes too early."""
    return isinstance(error, Refused) or any(said in str(error) for said in NOBODY_LISTENS)


def _is_full(error: RemoteError) -> bool:
    return isinstance(error, Refused) and error.reason is Reason.DISK_FULL


def nobody(address: str, last: object, plain: bool | None = None) -> str:
    """That nobody answers, and what may be the matter with a call that was `plain`, or was made with an identity."""
    hints = {
        True: " Or it has identities, and this call was made without one.",
        False: " Or it has no identities, and this call was made with one; --insecure goes without.",
        None: "",
    }
    hint = "" if NOBODY_LISTENS[0] in str(last) else hints[plain]  # who refuses at once has neither
    return f"no coordinator answers at {address}: is it running, is the address right?{hint} ({last})"


def channel_to(address: str, identity: Identity | None) -> grpc.Channel:
    if identity is None:
        return grpc.insecure_channel(address, options=OPTIONS)
    authority, key, certificate = identity.tls()
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authority, key, certificate), options=OPTIONS)


def as_ours(error: grpc.RpcError) -> RemoteError:
    """The error that a status carries: Refused if it names one of our reasons."""
    # needed here alone: clients on small machines count megabytes
    from google.rpc import error_details_pb2
    from grpc_status import rpc_status

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
