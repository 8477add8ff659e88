"""Errors of ours as gRPC statuses that carry ErrorInfo{reason}: nothing else ever leaves a coordinator."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from coordinator.callers import presented
from coordinator.events import Events, unheard
from coordinator.meter import Meter
from wire.contract import CONTRACT, DOMAIN, RETRY_AFTER_S, Action
from wire.errors import EdgetuneError, PayloadError, Reason, Refused, UserError


@dataclasses.dataclass(frozen=True)
class Refusals:
    """Ends calls by an error, which is counted and said."""

    meter: Meter
    events: Events = unheard

    async def end(
        self, context: grpc.aio.ServicerContext, error: EdgetuneError, method: str, request: Any = None
    ) -> None:
        """Raises, as gRPC wants it, once the status is out."""
        reason = reason_of(error)
        self.meter.refusals[reason] += 1
        who = presented(context)
        run = getattr(getattr(request, "contribution", request), "run", "")
        about = {"run": run, "caller": f"{who.role} {who.name}" if who else ""}
        self.events("refused", method=method.rpartition("/")[2], reason=reason.value, **about)
        await context.abort_with_status(rpc_status.to_status(status_of(error)))


def status_of(error: EdgetuneError) -> status_pb2.Status:
    """The gRPC status of an error, with ErrorInfo{reason}, and RetryInfo if the client is to try again."""
    reason = reason_of(error)
    rule, info = CONTRACT[reason], error_details_pb2.ErrorInfo(reason=reason.value, domain=DOMAIN)
    if isinstance(error, Refused) and error.offset is not None:
        info.metadata["offset"] = str(error.offset)
    details: list[Message] = [info]
    if rule.action is Action.RETRY:
        after_s = error.retry_after_s if isinstance(error, Refused) else None
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromTimedelta(datetime.timedelta(seconds=RETRY_AFTER_S if after_s is None else after_s))
        details.append(retry)
    return status_pb2.Status(
        code=code_pb2.Code.Value(rule.status), message=str(error), details=[_any(detail) for detail in details]
    )


def _any(message: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)
    return packed


def reason_of(error: EdgetuneError) -> Reason:
    """The name that an error leaves under."""
    if isinstance(error, Refused | PayloadError):
        return error.reason
    return Reason.BAD_REQUEST if isinstance(error, UserError) else Reason.CORRUPT_STORE
