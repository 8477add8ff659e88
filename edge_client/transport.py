"""The client's side of the protocol. `Connection` has every call, in layers: `calls`, `uploads`, `administration`, and here
what devices call."""

from __future__ import annotations

import dataclasses
import itertools
import json

import grpc

from edge_client.administration import Administration
from edge_client.calls import CALL_S, FRAME_BYTES, transfer_s
from protos.v1 import federation_pb2 as pb
from wire import run_spec
from wire.delta import Layout
from wire.errors import IdentityError, PayloadError, Reason
from wire.messages import PROTOCOL, Finished, ReleaseManifest, Task, Wait
from wire.run_spec import RunSpec


@dataclasses.dataclass(frozen=True, eq=False)
class Fetched:
    """A release as it came: `data` is an adapter, or steps or deltas of `sizes` bytes. Nothing is checked but the length."""

    release: ReleaseManifest
    data: memoryview
    sizes: tuple[int, ...]

    @property
    def links(self) -> list[memoryview]:
        """The steps or coded deltas, oldest first; none where the data are an adapter."""
        ends = list(itertools.accumulate(self.sizes))
        return [self.data[end - size : end] for size, end in zip(self.sizes, ends, strict=True)]


class Connection(Administration):
    """One coordinator."""

    def check_in(self, device: str, runs: tuple[str, ...], wait_s: float) -> Task | Wait | Finished:
        """A task, or none after `wait_s`, or the word that every run asked for has ended."""
        request = pb.CheckInRequest(
            device=device, runs=runs, wait_s=wait_s, protocol=PROTOCOL, edition=run_spec.EDITION
        )
        reply = self._unary(self._devices.CheckIn, request, CALL_S + wait_s)
        match reply.WhichOneof("answer"):
            case "task":
                return Task.from_proto(reply.task)
            case "finished":
                return Finished(tuple(reply.finished.runs))
            case _:
                return Wait(reply.wait.retry_after_s, reply.wait.active_runs)

    def describe(self, run: str) -> tuple[RunSpec, Layout]:
        """A run's spec and layout, checked."""
        reply = self._unary(self._devices.DescribeRun, pb.GetRunRequest(run=run))
        if self._identity is not None:
            self._identity.check_release_key(reply.release_key)
        return run_spec.parse(json.loads(reply.spec_json)), Layout.parse(json.loads(reply.layout_json))

    def release(self, run: str, limit: int, version: int | None, steps_after: int | None = None) -> Fetched:
        """A release (None: the newest) and at most `limit` bytes of it: its adapter, or what leads there from `steps_after`.

        With an identity, raises PayloadError for a release without the coordinator's signature."""
        request = pb.FetchReleaseRequest(run=run, version=version or 0, latest=version is None, steps_after=steps_after)
        return self._again(lambda: self._read_release(request, limit))

    def leave(self, device: str, task: Task) -> None:
        """Give a task back. Asked once: a coordinator that is not there will notice at the deadline."""
        request = pb.LeaveRequest(device=device, run=task.run, round=task.round, attempt=task.attempt)
        try:
            self._devices.Leave(request, timeout=2.0)
        except (grpc.RpcError, IdentityError):
            return

    def _read_release(self, request: pb.FetchReleaseRequest, limit: int) -> Fetched:
        manifest: ReleaseManifest | None = None
        sizes: tuple[int, ...] = ()
        data = bytearray()
        for chunk in self._devices.FetchRelease(request, timeout=transfer_s(limit)):
            self.received += chunk.ByteSize() + FRAME_BYTES
            if manifest is None:
                manifest, sizes = ReleaseManifest.parse(chunk.release.manifest_json), tuple(chunk.step_bytes)
                if self._identity is not None:
                    self._identity.check_release(manifest, chunk.release.signature)
            if len(data) + len(chunk.data) > limit:
                raise PayloadError(Reason.BAD_SIZE, f"a release is longer than the {limit} bytes it can have")
            data += chunk.data
        if manifest is None or (sizes and sum(sizes) != len(data)):
            raise PayloadError(Reason.BAD_SIZE, "a release arrived cut off")
        return Fetched(manifest, memoryview(data), sizes)
