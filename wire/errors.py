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
    pass


class Unreachable(RemoteError):
    pass


class PayloadError(EdgetuneError):
    """A payload that no retry can make right: wrong size, shape, digest, or not finite."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


class StoreError(EdgetuneError):
    pass


class Reason(enum.StrEnum):
    """Why a coordinator says no. The value travels in `ErrorInfo.reason`; `GRPC_CODE` gives its status."""

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
    NOT_ASSIGNED = "NOT_ASSIGNED"
    ROUND_CLOSED = "ROUND_CLOSED"
    STALE_RELEASE = "STALE_RELEASE"
    RUN_ENDED = "RUN_ENDED"
    RUN_EXISTS = "RUN_EXISTS"
    CONFLICTING_UPDATE = "CONFLICTING_UPDATE"
    DISK_FULL = "DISK_FULL"
    BUSY = "BUSY"
    CORRUPT_STORE = "CORRUPT_STORE"
    NO_IDENTITIES = "NO_IDENTITIES"
    NOT_ENROLLED = "NOT_ENROLLED"
    CERTIFICATE_EXPIRED = "CERTIFICATE_EXPIRED"
    REVOKED = "REVOKED"
    NOT_ALLOWED = "NOT_ALLOWED"
    FOREIGN_DEVICE = "FOREIGN_DEVICE"
    BAD_TOKEN = "BAD_TOKEN"
    NAME_TAKEN = "NAME_TAKEN"
    QUOTA = "QUOTA"
    UNKNOWN_DEVICE = "UNKNOWN_DEVICE"
    BAD_SIGNATURE = "BAD_SIGNATURE"
    ROLLED_BACK = "ROLLED_BACK"


class Refused(RemoteError):
    """The coordinator's no. Raised inside the coordinator, carried by gRPC, raised again on the client."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


GRPC_CODE: dict[Reason, str] = {
    Reason.BAD_REQUEST: "INVALID_ARGUMENT",
    Reason.BAD_SIZE: "INVALID_ARGUMENT",
    Reason.BAD_DIGEST: "INVALID_ARGUMENT",
    Reason.BAD_PAYLOAD: "INVALID_ARGUMENT",
    Reason.NOT_FINITE: "INVALID_ARGUMENT",
    Reason.TOO_LARGE: "INVALID_ARGUMENT",
    Reason.OUT_OF_RANGE: "INVALID_ARGUMENT",
    Reason.WRONG_BASE: "FAILED_PRECONDITION",
    Reason.WRONG_LAYOUT: "FAILED_PRECONDITION",
    Reason.WRONG_CODEC: "FAILED_PRECONDITION",
    Reason.UNKNOWN_RUN: "NOT_FOUND",
    Reason.UNKNOWN_RELEASE: "NOT_FOUND",
    Reason.UNKNOWN_BLOB: "NOT_FOUND",
    Reason.NOT_ASSIGNED: "PERMISSION_DENIED",
    Reason.ROUND_CLOSED: "FAILED_PRECONDITION",
    Reason.STALE_RELEASE: "FAILED_PRECONDITION",
    Reason.RUN_ENDED: "FAILED_PRECONDITION",
    Reason.RUN_EXISTS: "ALREADY_EXISTS",
    Reason.CONFLICTING_UPDATE: "ALREADY_EXISTS",
    Reason.DISK_FULL: "RESOURCE_EXHAUSTED",
    Reason.BUSY: "RESOURCE_EXHAUSTED",
    Reason.CORRUPT_STORE: "DATA_LOSS",
    Reason.NO_IDENTITIES: "FAILED_PRECONDITION",
    Reason.NOT_ENROLLED: "UNAUTHENTICATED",
    Reason.CERTIFICATE_EXPIRED: "UNAUTHENTICATED",
    Reason.REVOKED: "PERMISSION_DENIED",
    Reason.NOT_ALLOWED: "PERMISSION_DENIED",
    Reason.FOREIGN_DEVICE: "PERMISSION_DENIED",
    Reason.BAD_TOKEN: "UNAUTHENTICATED",
    Reason.NAME_TAKEN: "ALREADY_EXISTS",
    Reason.QUOTA: "RESOURCE_EXHAUSTED",
    Reason.UNKNOWN_DEVICE: "NOT_FOUND",
    Reason.BAD_SIGNATURE: "INVALID_ARGUMENT",
    Reason.ROLLED_BACK: "FAILED_PRECONDITION",
}
"""The gRPC status of each reason. Every reason has one; a test walks the enum."""
