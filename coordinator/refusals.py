"""Errors of ours as gRPC statuses that carry ErrorInfo{reason}: nothing else ever leaves a coordinator."""

from __future__ import annotations

from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2

from wire.errors import GRPC_CODE, EdgetuneError, PayloadError, Reason, Refused, UserError


def status_of(error: EdgetuneError) -> status_pb2.Status:
    """The gRPC status of an error, with ErrorInfo{reason}."""
    reason = reason_of(error)
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason=reason.value, domain="edgetune"))
    return status_pb2.Status(code=code_pb2.Code.Value(GRPC_CODE[reason]), message=str(error), details=[info])


def reason_of(error: EdgetuneError) -> Reason:
    """The name that an error leaves under."""
    if isinstance(error, Refused | PayloadError):
        return error.reason
    return Reason.BAD_REQUEST if isinstance(error, UserError) else Reason.CORRUPT_STORE
