"""What people who administer runs and devices call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import grpc

from edge_client.calls import WATCH_S, as_ours
from edge_client.uploads import Uploads
from protos.v1 import federation_pb2 as pb
from protos.v1 import federation_pb2_grpc as pb_grpc
from wire import spec
from wire.contract import Action, after
from wire.delta import Layout, Vector
from wire.messages import ACTIONS, AdministratorStanding, Control, DeviceStanding, RunStatus
from wire.run_spec import RunSpec


class Administration(Uploads):
    """The calls of the service of that name."""

    @property
    def _people(self) -> Any:
        self.keep_current()
        return pb_grpc.AdministrationStub(self._channel)  # type: ignore[no-untyped-call]  # generated code

    def create_run(self, created: RunSpec, layout: Layout, adapter: Vector) -> RunStatus:
        """Upload the initial adapter, float32 [layout.size], and open the run."""
        digest = self.upload(memoryview(adapter.astype("<f4").data).cast("B"))
        request = pb.CreateRunRequest(
            spec_json=spec.canonical(created).decode(),
            layout_json=spec.canonical(layout).decode(),
            adapter_digest=digest,
        )
        return RunStatus.from_proto(self._unary(self._people.CreateRun, request))

    def status(self, run: str) -> RunStatus:
        return RunStatus.from_proto(self._unary(self._people.GetRun, pb.GetRunRequest(run=run)))

    def control(self, run: str, action: Control, reason: str = "") -> RunStatus:
        """Pause, resume or stop a run; the reason is shown with its state."""
        number = next(number for number, name in ACTIONS.items() if name == action)
        request = pb.ControlRunRequest(run=run, action=pb.RunAction.Name(number), reason=reason)
        return RunStatus.from_proto(self._unary(self._people.ControlRun, request))

    def runs(self) -> list[RunStatus]:
        reply = self._unary(self._people.ListRuns, pb.ListRunsRequest())
        return [RunStatus.from_proto(status) for status in reply.runs]

    def invite(self, owner: str, quota: int | None, lifetime_s: float) -> tuple[str, float]:
        """A new invitation, and when it expires in Unix seconds."""
        request = pb.InviteRequest(owner=owner, quota=quota, lifetime_s=lifetime_s)
        reply = self._unary(self._people.Invite, request)
        return str(reply.invitation), float(reply.expires_at)

    def invite_administrator(self, name: str, lifetime_s: float) -> tuple[str, float]:
        """As `invite`, for a further administrator."""
        request = pb.InviteRequest(administrator=name, lifetime_s=lifetime_s)
        reply = self._unary(self._people.Invite, request)
        return str(reply.invitation), float(reply.expires_at)

    def devices(self) -> list[DeviceStanding]:
        reply = self._unary(self._people.ListDevices, pb.ListDevicesRequest())
        return [DeviceStanding.from_proto(device) for device in reply.devices]

    def revoke(self, device: str) -> DeviceStanding:
        return DeviceStanding.from_proto(self._unary(self._people.Revoke, pb.RevokeRequest(device=device)))

    def thaw(self, device: str) -> DeviceStanding:
        """Say that somebody has looked at a device that has an alarm."""
        return DeviceStanding.from_proto(self._unary(self._people.Thaw, pb.ThawRequest(device=device)))

    def administrators(self) -> list[AdministratorStanding]:
        reply = self._unary(self._people.ListAdministrators, pb.ListAdministratorsRequest())
        return [AdministratorStanding.from_proto(one) for one in reply.administrators]

    def revoke_administrator(self, name: str) -> AdministratorStanding:
        request = pb.RevokeAdministratorRequest(name=name)
        return AdministratorStanding.from_proto(self._unary(self._people.RevokeAdministrator, request))

    def watch(self, run: str) -> Iterator[RunStatus]:
        """The status now and after each change, until the run has ended."""
        while True:
            for status in self._again(lambda: self._watching(run)):
                yield status
                if status.ended:
                    return

    def _watching(self, run: str) -> Iterator[RunStatus]:
        """A stream that has already answered once, so that refusals are raised here and not while it is read."""
        stream = self._people.WatchRun(pb.GetRunRequest(run=run), timeout=WATCH_S)
        first = next(stream)

        def rest() -> Iterator[RunStatus]:
            yield RunStatus.from_proto(first)
            try:
                for message in stream:
                    yield RunStatus.from_proto(message)
            except grpc.RpcError as error:
                if after(ours := as_ours(error)) is not Action.RETRY:
                    raise ours from error

        return rest()
