"""The error contract: for each reason its gRPC status and what a client does with the request it was given for.

One table, used by both ends: the coordinator takes the status from it, a client what to do next. `docs/errors.md` is
`python -m wire.contract`, and a test holds it fresh.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

from wire.errors import Reason, Refused, RemoteError, Unreachable

DOMAIN = "edgetune"
RETRY_AFTER_S = 1.0
"""What a coordinator asks for that does not know better."""


class Action(enum.StrEnum):
    """What a client does. An update is forgotten by NEXT and DROP alone: after all others it lies on its disk as before."""

    RETRY = "retry"
    RESUME = "resume"
    NEXT = "next"
    DROP = "drop"
    ASK = "ask"


MEANING: Mapping[Action, str] = {
    Action.RETRY: "pause as long as the coordinator says, at least by its own growing, jittered pauses, then ask again",
    Action.RESUME: "read how far the upload has come and go on from there",
    Action.NEXT: "the round is over for this device: forget the update, check in for another task",
    Action.DROP: "no repetition can make it right: forget the update, stop and say why",
    Action.ASK: "a person must act: keep the update, stop and say why",
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """A row: gRPC status by name, action, and when it is given."""

    status: str
    action: Action
    when: str


CONTRACT: Mapping[Reason, Rule] = {
    Reason.BAD_REQUEST: Rule("INVALID_ARGUMENT", Action.DROP, "a field is not what the proto says"),
    Reason.BAD_SIZE: Rule("INVALID_ARGUMENT", Action.DROP, "other bytes than declared, in number"),
    Reason.BAD_DIGEST: Rule("INVALID_ARGUMENT", Action.DROP, "the whole has another SHA-256 than declared"),
    Reason.BAD_PAYLOAD: Rule("INVALID_ARGUMENT", Action.DROP, "it does not decode"),
    Reason.NOT_FINITE: Rule("INVALID_ARGUMENT", Action.DROP, "NaN or infinity"),
    Reason.TOO_LARGE: Rule(
        "INVALID_ARGUMENT", Action.DROP, "longer than any update of the run, or a part than any part"
    ),
    Reason.OUT_OF_RANGE: Rule("INVALID_ARGUMENT", Action.DROP, "an entry that the sum cannot take"),
    Reason.WRONG_BASE: Rule("FAILED_PRECONDITION", Action.DROP, "computed on another base or release than the round's"),
    Reason.WRONG_LAYOUT: Rule("FAILED_PRECONDITION", Action.DROP, "of another layout than the run's"),
    Reason.WRONG_CODEC: Rule("FAILED_PRECONDITION", Action.DROP, "coded otherwise than the run says"),
    Reason.UNKNOWN_RUN: Rule("NOT_FOUND", Action.ASK, "no run of this name"),
    Reason.UNKNOWN_RELEASE: Rule("NOT_FOUND", Action.ASK, "no such release of the run"),
    Reason.UNKNOWN_BLOB: Rule("NOT_FOUND", Action.RESUME, "the bytes to commit are not there, or no longer"),
    Reason.UNKNOWN_UPLOAD: Rule("NOT_FOUND", Action.RESUME, "the upload has expired, or never was"),
    Reason.NOT_ASSIGNED: Rule("PERMISSION_DENIED", Action.NEXT, "the device has no such task, or no such upload"),
    Reason.ROUND_CLOSED: Rule("FAILED_PRECONDITION", Action.NEXT, "the round takes no more updates"),
    Reason.STALE_RELEASE: Rule(
        "FAILED_PRECONDITION", Action.NEXT, "it starts from a release that is too old for the buffer that is open"
    ),
    Reason.RUN_ENDED: Rule(
        "FAILED_PRECONDITION", Action.ASK, "the run has ended: nothing is left to pause, resume or stop"
    ),
    Reason.RUN_EXISTS: Rule("ALREADY_EXISTS", Action.ASK, "another run has this name"),
    Reason.CONFLICTING_UPDATE: Rule(
        "ALREADY_EXISTS", Action.NEXT, "other bytes of this device are in the round already"
    ),
    Reason.WRONG_OFFSET: Rule(
        "ABORTED", Action.RESUME, "not where the upload ends; metadata `offset` says where that is"
    ),
    Reason.BAD_CHUNK: Rule("ABORTED", Action.RESUME, "a part has another SHA-256 than it says; nothing has changed"),
    Reason.STALLED: Rule("DEADLINE_EXCEEDED", Action.RESUME, "bytes came too slowly; what was acknowledged is kept"),
    Reason.TOO_MANY_UPLOADS: Rule("RESOURCE_EXHAUSTED", Action.RETRY, "the device's own uploads take all it may have"),
    Reason.DISK_FULL: Rule("RESOURCE_EXHAUSTED", Action.RETRY, "no room, or none that is not kept in reserve"),
    Reason.BUSY: Rule("RESOURCE_EXHAUSTED", Action.RETRY, "too much under way, or a store that does not answer now"),
    Reason.CORRUPT_STORE: Rule("DATA_LOSS", Action.ASK, "a stored object is missing or damaged"),
    Reason.NO_IDENTITIES: Rule(
        "FAILED_PRECONDITION", Action.ASK, "the coordinator has no identities, and this needs them"
    ),
    Reason.NOT_ENROLLED: Rule("UNAUTHENTICATED", Action.ASK, "no certificate, or not one of a device that is enrolled"),
    Reason.CERTIFICATE_EXPIRED: Rule("UNAUTHENTICATED", Action.ASK, "the certificate has ended"),
    Reason.REVOKED: Rule("PERMISSION_DENIED", Action.DROP, "the device was revoked, and nothing of it will be counted"),
    Reason.FROZEN: Rule(
        "PERMISSION_DENIED", Action.ASK, "the device's invitation was brought again: an administrator has to look"
    ),
    Reason.NOT_ALLOWED: Rule("PERMISSION_DENIED", Action.ASK, "callers of this role may not make this call"),
    Reason.FOREIGN_DEVICE: Rule("PERMISSION_DENIED", Action.ASK, "the call names another device than the certificate"),
    Reason.BAD_TOKEN: Rule("UNAUTHENTICATED", Action.ASK, "the invitation is unknown, used or expired"),
    Reason.NAME_TAKEN: Rule("ALREADY_EXISTS", Action.ASK, "another device is enrolled under this name"),
    Reason.QUOTA: Rule("RESOURCE_EXHAUSTED", Action.ASK, "the owner has as many devices as it may"),
    Reason.TOO_OFTEN: Rule(
        "RESOURCE_EXHAUSTED", Action.RETRY, "more enrolments at once than one address, or all, may try"
    ),
    Reason.UNKNOWN_DEVICE: Rule("NOT_FOUND", Action.ASK, "no device, or administrator, of this name is enrolled"),
    Reason.BAD_SIGNATURE: Rule(
        "INVALID_ARGUMENT", Action.ASK, "signed by another key than it should be, or not at all"
    ),
    Reason.ROLLED_BACK: Rule("FAILED_PRECONDITION", Action.ASK, "a release older than one that the device has seen"),
    Reason.TOO_OLD: Rule(
        "FAILED_PRECONDITION", Action.ASK, "the run asks for more than the client's program knows; says what to install"
    ),
}
"""Every reason has a row; a test walks the enum."""

BARE: Mapping[str, Action] = {
    "UNAVAILABLE": Action.RETRY,
    "DEADLINE_EXCEEDED": Action.RETRY,
    "CANCELLED": Action.RETRY,
    "ABORTED": Action.RETRY,
}
"""A status without ErrorInfo came from gRPC itself, or with a reason that this program does not know. The rest: ASK."""


def after(error: RemoteError) -> Action:
    """What a client does after an error."""
    if isinstance(error, Unreachable):
        return Action.RETRY
    return CONTRACT[error.reason].action if isinstance(error, Refused) else BARE.get(error.status, Action.ASK)


def markdown() -> str:
    """The table as `docs/errors.md` shows it."""
    lines = [
        "# Errors on the wire",
        "",
        "Generated from `wire/contract.py` by `make docs`.",
        "",
        f'Every refusal carries `google.rpc.ErrorInfo` with `domain` = "{DOMAIN}" and the `reason`; one that is to be',
        "retried also `google.rpc.RetryInfo`. What a client does:",
        "",
        "| action | meaning |",
        "|---|---|",
        *(f"| {action} | {MEANING[action]} |" for action in Action),
        "",
        "| reason | gRPC status | client | when |",
        "|---|---|---|---|",
        *(f"| `{reason}` | {rule.status} | {rule.action} | {rule.when} |" for reason, rule in CONTRACT.items()),
        "",
        "A status without `ErrorInfo` came from gRPC itself, and a reason may be newer than the client:",
        f"{', '.join(f'{status} ({action})' for status, action in BARE.items())}; all else: {Action.ASK}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
