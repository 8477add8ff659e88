"""A gRPC server that takes the calls of an update and does nothing with them: what `coordinator_throughput` compares with.

Server, options, messages and calls are a coordinator's; there is no check, no store and no answer but the one expected. With a
folder it does the least that makes an update durable under its digest: SHA-256 once, and once a write that is synced.

    python -m benchmarks.bare_coordinator [FOLDER]
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from typing import Any

import grpc

from coordinator.serve import OPTIONS, keep_freed_memory
from protos.v1 import federation_pb2 as pb
from protos.v1 import federation_pb2_grpc as pb_grpc


class Bare(pb_grpc.FederationServicer):
    """Answers as a coordinator would, had everything gone well."""

    async def CreateUpload(self, request: pb.Contribution, context: Any) -> pb.UploadState:
        return pb.UploadState(upload="0" * 32, offset=0, crc32=True)

    async def AppendUpload(self, parts: AsyncIterator[pb.UploadPart], context: Any) -> pb.UploadState:
        state = pb.UploadState()
        async for part in parts:
            state = pb.UploadState(upload=part.upload, offset=part.offset + len(part.data))
        return state

    async def Commit(self, request: pb.Contribution, context: Any) -> pb.Receipt:
        return _receipt(request)

    async def Submit(self, request: pb.SubmitRequest, context: Any) -> pb.Receipt:
        return _receipt(request.contribution)


class Least(Bare):
    """Keeps what comes in files of a folder, without a name."""

    def __init__(self, folder: str) -> None:
        self._folder = folder

    async def AppendUpload(self, parts: AsyncIterator[pb.UploadPart], context: Any) -> pb.UploadState:
        state, sha = pb.UploadState(), hashlib.sha256()
        with tempfile.TemporaryFile(dir=self._folder, buffering=0) as file:
            async for part in parts:
                data = part.data
                await asyncio.to_thread(_keep, data, file.fileno(), sha)
                state = pb.UploadState(upload=part.upload, offset=part.offset + len(data))
            await asyncio.to_thread(os.fsync, file.fileno())
        return state


def _keep(data: bytes, handle: int, sha: Any) -> None:
    sha.update(data)
    os.write(handle, data)


def _receipt(mine: pb.Contribution) -> pb.Receipt:
    return pb.Receipt(run=mine.run, round=mine.round, attempt=mine.attempt, device=mine.device, digest=mine.digest)


async def main() -> None:
    keep_freed_memory()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    server = grpc.aio.server(options=OPTIONS)
    served = Least(sys.argv[1]) if len(sys.argv) > 1 else Bare()
    pb_grpc.add_FederationServicer_to_server(served, server)  # type: ignore[no-untyped-call]  # generated code
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(json.dumps({"event": "listening", "address": f"127.0.0.1:{port}"}), flush=True)
    await stop.wait()
    await server.stop(1)


if __name__ == "__main__":
    asyncio.run(main())
