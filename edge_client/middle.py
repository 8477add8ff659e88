"""Split learning's wire: hidden states to a helper that computes the middle layers, and back (arXiv 1812.00564, FedBERT).

What travels is float16 with one scale, so that neither large activations nor small gradients leave its range. Hidden states tell
of the text that made them: a helper sees more of a device's data than a coordinator does.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import grpc
import numpy as np

from edge_client.calls import as_ours, channel_to
from protos.v1 import middle_pb2 as pb
from protos.v1 import middle_pb2_grpc as pb_grpc
from wire.delta import Vector
from wire.errors import PayloadError, Reason, RemoteError

if TYPE_CHECKING:
    from edge_client.identity import Identity

MOST_TOKENS = 1 << 16
"""Positions in one call."""
LARGEST = 1024.0
"""What the largest entry of a tensor becomes in float16, whose range it leaves free on both sides."""
CALL_S = 120.0


def packed(hidden: Vector, base: str, exact: bool) -> pb.Hidden:
    """Hidden states float32 [B, T, D] as they travel. Raises ValueError for entries that are not finite."""
    top = float(np.abs(hidden).max(initial=0))
    if not np.isfinite(top):
        raise ValueError("hidden states must be finite")
    scale = np.float32(top / LARGEST) if top else np.float32(1)
    values = (hidden / scale).astype("<f2").tobytes()
    batch, length, width = hidden.shape
    return pb.Hidden(base=base, batch=batch, length=length, width=width, scale=float(scale), values=values, exact=exact)


def unpacked(message: pb.Hidden, width: int) -> Vector:
    """Hidden states float32 [B, T, D]. Raises PayloadError for anything else than `packed` makes, before a copy is made."""
    tokens = message.batch * message.length
    if message.width != width or not 0 < tokens <= MOST_TOKENS or len(message.values) != 2 * tokens * width:
        raise PayloadError(Reason.BAD_SIZE, f"hidden states of another size than their {width} columns and shape say")
    values = np.frombuffer(message.values, "<f2").astype(np.float32) * np.float32(message.scale)
    if not np.isfinite(values).all():
        raise PayloadError(Reason.NOT_FINITE, "hidden states have entries that are not finite")
    return values.reshape(message.batch, message.length, width)


@dataclasses.dataclass(frozen=True)
class Helper:
    """Where a helper listens, and what to call it with."""

    address: str
    identity: Identity | None = None


class Middle:
    """A helper, as a device calls it. `sent` and `received` count bytes of hidden states."""

    def __init__(self, helper: Helper, base: str) -> None:
        """Raises Unreachable where nobody listens, Refused for a helper of another base."""
        self._base = base
        self._stub = pb_grpc.MiddleStub(channel_to(helper.address, helper.identity))  # type: ignore[no-untyped-call]  # generated code
        self.sent = self.received = self.calls = 0
        try:
            found = self._stub.Describe(pb.MiddleRequest(base=base), timeout=CALL_S)
        except grpc.RpcError as error:
            raise RemoteError(f"the helper at {helper.address}: {as_ours(error)}") from error
        self.first, self.last = found.first, found.last

    def forward(self, hidden: Vector, exact: bool) -> Vector:
        """What leaves the middle layers, float32 [B, T, D]. Raises RemoteError."""
        sent = packed(hidden, self._base, exact)
        return self._asked(self._stub.Forward, sent, len(sent.values), hidden.shape[-1])

    def backward(self, hidden: Vector, by_left: Vector) -> Vector:
        """The loss's derivative by what entered, float32 [B, T, D]. Raises RemoteError."""
        entered, gradient = packed(hidden, self._base, False), packed(by_left, self._base, False)
        request = pb.HiddenGradient(entered=entered, by_left=gradient)
        return self._asked(self._stub.Backward, request, len(entered.values) + len(gradient.values), hidden.shape[-1])

    def _asked(self, call: grpc.UnaryUnaryMultiCallable, request: object, size: int, width: int) -> Vector:
        try:
            answer = call(request, timeout=CALL_S, wait_for_ready=True)
        except grpc.RpcError as error:
            raise as_ours(error) from error
        self.calls += 1
        self.sent += size
        self.received += len(answer.values)
        return unpacked(answer, width)
