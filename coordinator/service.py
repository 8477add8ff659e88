"""What devices call: protobuf in, one call into the store, protobuf out."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import grpc

from coordinator import ingest, publish
from coordinator.core import POLL_S, Core, answered, streamed
from coordinator.guards import Arriving, turn
from coordinator.rules import Rules
from coordinator.stores import Ask, updates
from coordinator.threads import on
from coordinator.uploads import TURN_S, Part
from protos.v1 import federation_pb2 as pb
from protos.v1 import federation_pb2_grpc as pb_grpc
from wire import run_spec, spec
from wire.contract import CONTRACT, Action
from wire.delta import MAX_PARAMETERS
from wire.errors import PayloadError, Reason, Refused
from wire.messages import CHUNK_BYTES, MAX_WAIT_S, PROTOCOL, Contribution, Receipt, ReleaseManifest

T = TypeVar("T")


class Federation(pb_grpc.FederationServicer):
    """What devices call."""

    def __init__(self, core: Core) -> None:
        self._core, self._store = core, core.store

    @answered
    async def CheckIn(self, request: pb.CheckInRequest, context: grpc.aio.ServicerContext) -> pb.CheckInReply:
        _check_device(request.device)
        if request.protocol != PROTOCOL:
            raise Refused(
                Reason.BAD_REQUEST, f"this coordinator speaks protocol {PROTOCOL}, the device {request.protocol}"
            )
        ask = Ask(request.device, tuple(dict.fromkeys(request.runs)), request.edition or 1)
        lobby, clock_s = self._core.lobby, asyncio.get_running_loop().time
        until = clock_s() + min(max(0.0, request.wait_s), MAX_WAIT_S)  # in this order: NaN, which spoils timers, is 0
        while True:
            ticket = self._core.work.ticket()
            offers = await lobby.ask(ask)
            if offers.task is not None:
                self._core.changed.ring()
                return pb.CheckInReply(task=offers.task.to_proto())
            if offers.ended and not offers.active:
                return pb.CheckInReply(finished=pb.Finished(runs=offers.ended))
            if (left := until - clock_s()) <= 0 or self._core.draining or lobby.full:
                pause_s = lobby.send_away(offers.work_in_s)
                return pb.CheckInReply(wait=pb.Wait(retry_after_s=pause_s, active_runs=offers.active))
            with lobby.place():
                await self._core.work.wait(ticket, min(left, POLL_S))

    @answered
    async def DescribeRun(self, request: pb.GetRunRequest, context: grpc.aio.ServicerContext) -> pb.RunDescription:
        run = await self._store.ledger.run(request.run)
        await _compress(context)  # the names of tensors are long and alike
        return pb.RunDescription(
            spec_json=spec.canonical(run.spec).decode(),
            layout_json=spec.canonical(run.layout).decode(),
            release_key=self._core.who.authority.release_key if self._core.who else "",
        )

    @streamed
    async def FetchRelease(
        self, request: pb.FetchReleaseRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.ReleaseChunk]:
        version = None if request.latest else request.version
        release = await self._store.ledger.release(request.run, version)
        async with turn(self._core.downloads, TURN_S):
            data, sizes = await self._content(release, request.steps_after if request.HasField("steps_after") else None)
            signature = await self._core.who.signature(release.digest) if self._core.who else ""
            first = pb.Release(manifest_json=spec.canonical(release).decode(), signature=signature)
            await _compress(context)
            yield pb.ReleaseChunk(release=first, step_bytes=sizes)
            for start in range(0, len(data), CHUNK_BYTES):
                context.disable_next_message_compression()  # it would cost much and give nothing
                yield pb.ReleaseChunk(data=bytes(data[start : start + CHUNK_BYTES]))

    async def _content(self, release: ReleaseManifest, after: int | None) -> tuple[memoryview, list[int]]:
        """A release's bytes, and the length of each link if they are steps or coded deltas: the shorter of history and
        snapshot."""
        by = await self._core.rules(release.run)
        if after is not None and by.leads(after, release.version):
            links = await self._links(by, release, after)
            if sum(map(len, links)) <= by.snapshot_bytes:
                return memoryview(b"".join(links)), [len(link) for link in links]
        if release.adapter is not None:
            return await self._core.blob(release.adapter), []
        first, links = await self._first(release.run), await self._links(by, release, 0)
        return await on(self._core.compute, self._snapshot, by, first, links), []

    async def _links(self, by: Rules, release: ReleaseManifest, after: int) -> list[memoryview]:
        """The steps or coded deltas that lead from version `after` to `release`; of a pool the newest holds all steps."""
        pool = by.codec is None and by.along().drawn == "pool"
        versions = range(max(release.version, 1) if pool else after + 1, release.version + 1)
        found = [await self._store.ledger.release(release.run, version) for version in versions]
        return [await self._core.blob(one.step or one.delta or "") for one in found]

    async def _first(self, run: str) -> memoryview:
        first = await self._store.ledger.release(run, 0)
        return await self._core.blob(first.adapter or "")

    def _snapshot(self, by: Rules, first: memoryview, steps: list[memoryview]) -> memoryview:
        state = publish.replayed(by, publish.vector(first, by.layout.size), steps)
        parts = [state.adapter] if state.curvature is None else [state.adapter, state.curvature]
        return memoryview(b"".join(publish.as_bytes(part) for part in parts))

    @answered
    async def Submit(self, request: pb.SubmitRequest, context: grpc.aio.ServicerContext) -> pb.Receipt:
        with self._core.guards.in_flight(len(request.payload)):
            return await self._take(request.contribution, request.payload)

    @answered
    async def Commit(self, request: pb.Contribution, context: grpc.aio.ServicerContext) -> pb.Receipt:
        return await self._take(request, None)

    async def _take(self, message: pb.Contribution, payload: bytes | None) -> pb.Receipt:
        receipt = await self._taken(message, lambda mine: self._receive(mine, payload))
        self._core.accepted.ring()
        if not message.digest:  # an evaluation: with the last one the run has ended, which held check-ins wait to hear
            self._core.work.ring()
        return receipt.to_proto()

    @answered
    async def CreateUpload(self, request: pb.Contribution, context: grpc.aio.ServicerContext) -> pb.UploadState:
        return await self._taken(request, self._create_upload)

    async def _create_upload(self, mine: Contribution) -> pb.UploadState:
        if receipt := await self._store.ledger.check(mine):
            return pb.UploadState(offset=mine.size, receipt=receipt.to_proto())
        if not mine.digest:
            raise PayloadError(Reason.BAD_REQUEST, "an evaluation has nothing to upload")
        ingest.declared(mine, await self._core.rules(mine.run))
        upload = await self._core.uploads.create(mine)
        return pb.UploadState(upload=upload.id, offset=upload.received, crc32=True)

    @answered
    async def AppendUpload(
        self, parts: AsyncIterator[pb.UploadPart], context: grpc.aio.ServicerContext
    ) -> pb.UploadState:
        with self._core.guards.stream(), self._core.guards.arriving(parts, Part.from_proto) as arriving:
            upload = await self._core.uploads.receive(arriving)
        if upload is None:
            raise PayloadError(Reason.BAD_REQUEST, "a stream without a part")
        return pb.UploadState(upload=upload.id, offset=upload.received)

    async def _taken(self, message: pb.Contribution, work: Callable[[Contribution], Awaitable[T]]) -> T:
        """Do what is asked with a contribution. A refusal is counted; what can never be counted leaves nothing behind."""
        try:
            mine = Contribution.from_proto(message)
            try:
                return await work(mine)
            except (PayloadError, Refused) as error:
                if mine.digest and CONTRACT[error.reason].action in (Action.NEXT, Action.DROP):
                    await self._core.uploads.forget(mine)
                raise
        except (PayloadError, Refused) as error:
            await self._store.ledger.refuse(message.run, error.reason)
            raise
        finally:
            self._core.changed.ring()

    async def _receive(self, contribution: Contribution, payload: bytes | None) -> Receipt:
        """Check, make the bytes durable, then the row that names them; only then is there a receipt."""
        receipt, since_us = await self._store.ledger.look(
            lambda db, now_us: (updates.check(db, contribution, now_us), now_us)
        )
        if receipt:
            return receipt
        if contribution.digest:
            by = await self._core.rules(contribution.run)
            ingest.declared(contribution, by)
            if payload is None:
                await self._core.uploads.finish(contribution, by)
            else:
                await on(self._core.compute, ingest.examine, contribution, payload, by)
                await on(self._core.disk, self._put, payload)
        receipt = await self._store.ledger.accept(contribution, since_us)
        self._core.meter.accepts += 1
        if contribution.digest and payload is None:
            await self._core.uploads.forget(contribution)
        return receipt

    def _put(self, payload: bytes) -> None:
        self._core.guards.room(len(payload))
        self._store.blobs.put(payload)

    @answered
    async def Upload(self, chunks: AsyncIterator[pb.UploadChunk], context: grpc.aio.ServicerContext) -> pb.UploadReply:
        with self._core.guards.arriving(chunks, Chunk.from_proto) as arriving:
            first = await arriving.next()
            async with turn(self._core.streams, TURN_S):
                return pb.UploadReply(digest=await self._store_chunks(first, arriving))

    async def _store_chunks(self, chunk: Chunk | None, arriving: Arriving[pb.UploadChunk, Chunk]) -> str:
        if chunk is None or not run_spec.DIGEST.fullmatch(chunk.digest):
            raise PayloadError(Reason.BAD_REQUEST, "the first chunk must name the digest of the whole")
        if not 0 < chunk.size <= 4 * MAX_PARAMETERS:
            raise PayloadError(Reason.TOO_LARGE, f"an upload has 1 to {4 * MAX_PARAMETERS} bytes, not {chunk.size}")
        await on(self._core.disk, self._core.guards.room, chunk.size)
        with self._store.blobs.writer(chunk.digest, chunk.size) as writer:
            while chunk is not None:
                await on(self._core.disk, writer.write, chunk.data)
                chunk = await arriving.next()
            return await on(self._core.disk, writer.commit)

    @answered
    async def Leave(self, request: pb.LeaveRequest, context: grpc.aio.ServicerContext) -> pb.LeaveReply:
        await self._store.ledger.leave(request.device, request.run, request.round, request.attempt)
        self._core.work.ring()
        self._core.changed.ring()
        return pb.LeaveReply()


@dataclasses.dataclass(frozen=True, eq=False)
class Chunk:
    """Bytes of a stream; its first says of the whole its digest and size."""

    digest: str
    size: int
    data: bytes

    @classmethod
    def from_proto(cls, message: pb.UploadChunk) -> Chunk:
        return cls(message.digest, message.size, message.data)


def _check_device(device: str) -> None:
    if not run_spec.NAME.fullmatch(device):
        raise PayloadError(Reason.BAD_REQUEST, "a device name is 1 to 64 of a-z 0-9 . _ -")


async def _compress(context: grpc.aio.ServicerContext) -> None:
    """Let gRPC compress this call's answers from now on."""
    context.set_compression(grpc.Compression.Gzip)
    await context.send_initial_metadata(())  # without which grpc.aio forgets the line before
