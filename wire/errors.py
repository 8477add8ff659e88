"""Every error the program raises on purpose, in one tree that says who is to blame.

EdgetuneError
├── UserError             the person at this machine: a flag, a file, a spec        exit 2
│   ├── DataError         a data file; names the file and the line
│   ├── SpecError         a run, codec or method spec; names the key
│   ├── BaseModelError    no such base model, or one of another digest
│   ├── IdentityError     who this caller is: not enrolled, or its certificate is out of its time
│   └── MissingExtra      a package is absent; carries the install line
├── MachineError          this machine: disk full, port in use, out of memory       exit 1
├── RemoteError           the other end, or the way there                           exit 1
│   ├── Unreachable       nobody answered within the deadline
│   └── Refused           the coordinator answered no, by name (`reason`)
├── PayloadError          bytes from the network are not what they claim to be
├── Diverged              a run's arithmetic left what float32 can say: its rules, not its bytes, are at fault
└── StoreError            a stored object is missing or fails its hash
"""

from __future__ import annotations

import enum


class EdgetuneError(Exception):
    """Root of the tree; `exit_code` is what a command returns when it ends with this error."""

    exit_code = 1


class UserError(EdgetuneError):
    exit_code = 2


class DataError(UserError):
    pass


class SpecError(UserError):
    pass


class BaseModelError(UserError):
    pass


class IdentityError(UserError):
    pass


class MissingExtra(UserError):
    """A package that an extra brings is not installed."""

    def __init__(self, needs: str, extra: str) -> None:
        super().__init__(f"{needs} is not installed: pip install 'edgetune[{extra}]'")


class MachineError(EdgetuneError):
    pass


class RemoteError(EdgetuneError):
    """`status` names the gRPC status that came without a reason; empty where there was none."""

    def __init__(self, detail: str, status: str = "") -> None:
        super().__init__(detail)
        self.status = status


class Unreachable(RemoteError):
    pass


class PayloadError(EdgetuneError):
    """A payload that no retry can make right: wrong size, shape, digest, or not finite."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class Diverged(EdgetuneError):
    pass


class StoreError(EdgetuneError):
    pass


def ended(error: Exception) -> dict[str, str]:
    """What a command ends by that shows JSON; with the coordinator's reason, if it gave one."""
    reason = {"reason": error.reason.value} if isinstance(error, Refused | PayloadError) else {}
    return {"event": "ended", "error": str(error), **reason}


class Reason(enum.StrEnum):
    """Why a coordinator says no. The value travels in `ErrorInfo.reason`; `wire/contract.py` says what follows."""

    BAD_REQUEST = "BAD_REQUEST"
    BAD_SIZE = "BAD_SIZE"
    BAD_DIGEST = "BAD_DIGEST"
    BAD_PAYLOAD = "BAD_PAYLOAD"
    NOT_FINITE = "NOT_FINITE"
    TOO_LARGE = "TOO_LARGE"
    OUT_OF_RANGE = "OUT_OF_RANGE"
    WRONG_BASE = "WRONG_BASE"
    WRONG_LAYOUT = "WRONG_LAYOUT"
    WRONG_CODEC = "WRONG_CODEC"
    UNKNOWN_RUN = "UNKNOWN_RUN"
    UNKNOWN_RELEASE = "UNKNOWN_RELEASE"
    UNKNOWN_BLOB = "UNKNOWN_BLOB"
    UNKNOWN_UPLOAD = "UNKNOWN_UPLOAD"
    NOT_ASSIGNED = "NOT_ASSIGNED"
    ROUND_CLOSED = "ROUND_CLOSED"
    STALE_RELEASE = "STALE_RELEASE"
    RUN_ENDED = "RUN_ENDED"
    RUN_EXISTS = "RUN_EXISTS"
    CONFLICTING_UPDATE = "CONFLICTING_UPDATE"
    WRONG_OFFSET = "WRONG_OFFSET"
    BAD_CHUNK = "BAD_CHUNK"
    STALLED = "STALLED"
    TOO_MANY_UPLOADS = "TOO_MANY_UPLOADS"
    DISK_FULL = "DISK_FULL"
    BUSY = "BUSY"
    CORRUPT_STORE = "CORRUPT_STORE"
    NO_IDENTITIES = "NO_IDENTITIES"
    NOT_ENROLLED = "NOT_ENROLLED"
    CERTIFICATE_EXPIRED = "CERTIFICATE_EXPIRED"
    REVOKED = "REVOKED"
    FROZEN = "FROZEN"
    NOT_ALLOWED = "NOT_ALLOWED"
    FOREIGN_DEVICE = "FOREIGN_DEVICE"
    BAD_TOKEN = "BAD_TOKEN"
    NAME_TAKEN = "NAME_TAKEN"
    QUOTA = "QUOTA"
    TOO_OFTEN = "TOO_OFTEN"
    UNKNOWN_DEVICE = "UNKNOWN_DEVICE"
    BAD_SIGNATURE = "BAD_SIGNATURE"
    ROLLED_BACK = "ROLLED_BACK"
    TOO_OLD = "TOO_OLD"


class Refused(RemoteError):
    """The coordinator's no. Raised inside the coordinator, carried by gRPC, raised again on the client.

    `retry_after_s` says when asking again may help, `offset` where an upload ends; None where neither is known.
    """

    def __init__(
        self, reason: Reason, detail: str, retry_after_s: float | None = None, offset: int | None = None
    ) -> None:
        super().__init__(detail)
        self.reason, self.retry_after_s, self.offset = reason, retry_after_s, offset
