"""How updates and other bytes get to a coordinator: small ones in one call, large ones in parts that go on where they were."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import grpc

from edge_client.calls import FRAME_BYTES, SEND_AGAIN, Calls, as_ours, transfer_s
from protos.v1 import federation_pb2 as pb
from wire import spec
from wire.errors import PayloadError, Reason
from wire.messages import CHUNK_BYTES, PART_BYTES, Contribution, Receipt

PART_S = 90.0
"""Deadline of one part of an upload: longer than a coordinator waits for a slow one."""
QUICK_S = 1.0
"""After a call that took no longer the next may carry twice as much, else half."""
CALL_BYTES = 2 * PART_BYTES
"""What one call carries: one part. More would keep the next on its way while one is written, and cost a coordinator memory."""
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
        """Whatever breaks, ask how far the upload is and send the rest. The first answer and each durable byte renew patience."""
        patience, reached = self._patience(), -1
        while True:
            self._check_window()
            try:
                state = self._call(self._devices.CreateUpload, mine)
                if state.HasField("receipt"):
                    return Receipt.from_proto(state.receipt)
                if state.offset > reached:
                    patience, reached = self._patience(), state.offset
                self._send_rest(state, mine.device, payload, progress)
                return Receipt.from_proto(self._call(self._devices.Commit, mine, transfer_s(mine.size)))
            except grpc.RpcError as error:
                patience.pause(as_ours(error), SEND_AGAIN)

    def _send_rest(self, state: pb.UploadState, device: str, payload: memoryview, progress: Progress) -> None:
        offset, size, step = state.offset, len(payload), PART_BYTES
        progress(offset, size)
        while offset < size:
            began, end = time.monotonic(), min(offset + step, size)
            parts = self._counted(_parts(state.upload, device, payload[:end], offset))
            answer: pb.UploadState = self._devices.AppendUpload(parts, timeout=PART_S * -(-step // (2 * PART_BYTES)))
            self.received += answer.ByteSize() + FRAME_BYTES
            if answer.offset != end:
                raise PayloadError(Reason.BAD_REQUEST, f"the coordinator took bytes to {end} and says {answer.offset}")
            quick = time.monotonic() - began < QUICK_S
            offset, step = end, min(2 * step, CALL_BYTES) if quick else max(step // 2, PART_BYTES)
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


def _parts(upload: str, device: str, payload: memoryview, start: int) -> Iterator[pb.UploadPart]:
    for offset in range(start, len(payload), 2 * PART_BYTES):
        data = bytes(payload[offset : offset + 2 * PART_BYTES])
        yield pb.UploadPart(upload=upload, device=device, offset=offset, digest=spec.bytes_digest(data), data=data)


def _cut(data: bytes | memoryview, digest: str) -> Iterator[pb.UploadChunk]:
    view = memoryview(data)
    yield pb.UploadChunk(digest=digest, size=len(view), data=bytes(view[:CHUNK_BYTES]))
    for start in range(CHUNK_BYTES, len(view), CHUNK_BYTES):
        yield pb.UploadChunk(data=bytes(view[start : start + CHUNK_BYTES]))
