"""How updates and other bytes get to a coordinator: small ones in one call, large ones in parts that go on where they were."""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import grpc

from edge_client.calls import FRAME_BYTES, SEND_AGAIN, Calls, as_ours, transfer_s
from protos.v1 import federation_pb2 as pb
from wire import spec
from wire.errors import PayloadError, Reason
from wire.messages import CHUNK_BYTES, PART_BYTES, Contribution, Receipt

QUICK_S = 1.0
"""A part after which the next is asked for within this time is followed by one four times as long, a call that took no longer by
one that carries four times as much; slower ones by PART_BYTES."""
FIRST_PART_BYTES, LONGEST_PART_BYTES = PART_BYTES // 4, 2 * PART_BYTES
"""The first part of a call may wait in a coordinator's memory for its turn, beside those of many others."""
CALL_BYTES = 8 << 20
"""What one call carries at most: bytes are known to be durable when it is answered."""
Sent = TypeVar("Sent", pb.UploadChunk, pb.UploadPart)
Progress = Callable[[int, int], None]
"""Told of an upload how many bytes are durable, of how many."""


class Uploads(Calls):
    """The calls that send bytes."""

    def send(self, contribution: Contribution, payload: bytes, progress: Progress = lambda sent, size: None) -> Receipt:
        """Send an update and get its receipt. Small ones in one call, large ones in parts, going on where they were.

        Raises Refused for a no, Unreachable or RemoteError when patience ends; the caller keeps what it wrote down.
        """
        if len(payload) > CHUNK_BYTES:
            return self._upload(contribution.to_proto(), memoryview(payload), progress)
        request, deadline_s = (
            pb.SubmitRequest(contribution=contribution.to_proto(), payload=payload),
            transfer_s(len(payload)),
        )
        receipt = self._again(lambda: self._call(self._devices.Submit, request, deadline_s), SEND_AGAIN)
        return Receipt.from_proto(receipt)

    def _upload(self, mine: pb.Contribution, payload: memoryview, progress: Progress) -> Receipt:
        """Whatever breaks, ask how far the upload is and send the rest. The first answer and each durable byte renew patience.

        A link that has not broken yet is trusted with as much as a call carries; one that has, with a part at first.
        """
        patience, reached, broke = self._patience(), -1, False
        while True:
            self._check_window()
            try:
                state = self._call(self._devices.CreateUpload, mine)
                if state.HasField("receipt"):
                    return Receipt.from_proto(state.receipt)
                if state.offset > reached:
                    patience, reached = self._patience(), state.offset
                broke = broke or state.offset > 0
                self._send_rest(state, mine.device, payload, progress, PART_BYTES if broke else CALL_BYTES)
                return Receipt.from_proto(self._call(self._devices.Commit, mine, transfer_s(mine.size)))
            except grpc.RpcError as error:
                broke = True
                patience.pause(as_ours(error), SEND_AGAIN)

    def _send_rest(
        self, state: pb.UploadState, device: str, payload: memoryview, progress: Progress, step: int
    ) -> None:
        offset, size = state.offset, len(payload)
        progress(offset, size)
        while offset < size:
            began, end = time.monotonic(), min(offset + step, size)
            parts = self._counted(_parts(state, device, payload[:end], offset))
            answer: pb.UploadState = self._devices.AppendUpload(parts, timeout=transfer_s(end - offset))
            self.received += answer.ByteSize() + FRAME_BYTES
            if answer.offset != end:
                raise PayloadError(Reason.BAD_REQUEST, f"the coordinator took bytes to {end} and says {answer.offset}")
            offset, step = end, _following(step, CALL_BYTES, time.monotonic() - began)
            progress(offset, size)

    def upload(self, data: bytes | memoryview) -> str:
        """Store bytes that are no update with the coordinator, in one stream; their digest."""
        digest = spec.bytes_digest(data)

        def attempt() -> str:
            reply = self._devices.Upload(self._counted(_cut(data, digest)), timeout=transfer_s(len(data)))
            return str(reply.digest)

        return self._again(attempt, SEND_AGAIN)

    def _counted(self, chunks: Iterator[Sent]) -> Iterator[Sent]:
        for chunk in chunks:
            self.sent += chunk.ByteSize() + FRAME_BYTES
            yield chunk


def _following(step: int, longest: int, took_s: float) -> int:
    """How much follows after `step` bytes that took so long."""
    return min(4 * step, longest) if took_s < QUICK_S else PART_BYTES


def _parts(state: pb.UploadState, device: str, payload: memoryview, offset: int) -> Iterator[pb.UploadPart]:
    """gRPC asks for the next part when the one before has left."""
    step = FIRST_PART_BYTES
    while offset < len(payload):
        data = bytes(payload[offset : offset + step])
        check: dict[str, Any] = {"crc32": zlib.crc32(data)} if state.crc32 else {"digest": spec.bytes_digest(data)}
        began = time.monotonic()
        yield pb.UploadPart(upload=state.upload, device=device, offset=offset, data=data, **check)
        offset, step = offset + len(data), _following(step, LONGEST_PART_BYTES, time.monotonic() - began)


def _cut(data: bytes | memoryview, digest: str) -> Iterator[pb.UploadChunk]:
    view = memoryview(data)
    yield pb.UploadChunk(digest=digest, size=len(view), data=bytes(view[:CHUNK_BYTES]))
    for start in range(CHUNK_BYTES, len(view), CHUNK_BYTES):
        yield pb.UploadChunk(data=bytes(view[start : start + CHUNK_BYTES]))
