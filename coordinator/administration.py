"""What people who administer runs and devices call."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import grpc

from coordinator import ingest, publish
from coordinator.callers import presented
from coordinator.core import NO_IDENTITIES, POLL_S, Core, answered, streamed
from coordinator.rules import Rules, check_codecs
from coordinator.stores.administrators import Administrator
from coordinator.stores.devices import Device
from coordinator.threads import on
from protos.v1 import federation_pb2 as pb
from protos.v1 import federation_pb2_grpc as pb_grpc
from wire import run_spec
from wire.delta import Layout
from wire.errors import PayloadError, Reason, Refused
from wire.messages import ACTIONS


class Administration(pb_grpc.AdministrationServicer):
    """The service of that name."""

    def __init__(self, core: Core) -> None:
        self._core, self._store = core, core.store

    @answered
    async def CreateRun(self, request: pb.CreateRunRequest, context: grpc.aio.ServicerContext) -> pb.RunStatus:
        created = run_spec.parse(_json(request.spec_json))
        layout = Layout.parse(_json(request.layout_json))
        Rules.of(created, layout)
        await on(self._core.compute, check_codecs, created)
        if not run_spec.DIGEST.fullmatch(request.adapter_digest):
            raise PayloadError(Reason.BAD_REQUEST, "adapter_digest must be 64 hexadecimal digits")
        if created.start not in (None, request.adapter_digest):
            raise PayloadError(Reason.BAD_DIGEST, "the run starts from another adapter than was sent")
        since_us = await self._store.ledger.now_us()
        ingest.examine_adapter(await self._core.blob(request.adapter_digest), created, layout)
        release = publish.initial(created, layout, request.adapter_digest)
        if self._core.who is not None:
            await self._core.who.sign(release.digest)
        elif created.cohort.owner_share is not None:
            raise Refused(Reason.NO_IDENTITIES, f"cohort.owner_share: {NO_IDENTITIES}")
        await self._store.ledger.create_run(created, layout, release, since_us)
        self._core.events("created", run=created.name)
        self._core.work.ring()
        return (await self._store.ledger.status(created.name)).to_proto()

    @answered
    async def ControlRun(self, request: pb.ControlRunRequest, context: grpc.aio.ServicerContext) -> pb.RunStatus:
        if request.action not in ACTIONS:
            raise Refused(Reason.BAD_REQUEST, "a run can be paused, resumed or stopped")
        await self._store.ledger.control(request.run, ACTIONS[request.action], request.reason)
        self._core.events("controlled", run=request.run, action=ACTIONS[request.action])
        self._core.work.ring()
        self._core.changed.ring()
        return (await self._store.ledger.status(request.run)).to_proto()

    @answered
    async def GetRun(self, request: pb.GetRunRequest, context: grpc.aio.ServicerContext) -> pb.RunStatus:
        return (await self._store.ledger.status(request.run)).to_proto()

    @answered
    async def ListRuns(self, request: pb.ListRunsRequest, context: grpc.aio.ServicerContext) -> pb.ListRunsReply:
        names = await self._store.ledger.names()
        return pb.ListRunsReply(runs=[(await self._store.ledger.status(name)).to_proto() for name in names])

    @streamed
    async def WatchRun(
        self, request: pb.GetRunRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.RunStatus]:
        shown = None
        while True:
            ticket = self._core.changed.ticket()
            status = await self._store.ledger.status(request.run)
            if status != shown:
                yield status.to_proto()
                shown = status
            if status.ended or self._core.draining:
                return
            await self._core.changed.wait(ticket, POLL_S)

    @answered
    async def Invite(self, request: pb.InviteRequest, context: grpc.aio.ServicerContext) -> pb.InviteReply:
        who, quota = self._core.identities, request.quota if request.HasField("quota") else None
        if request.administrator:
            invitation, expires_at = await who.invite_administrator(request.administrator, request.lifetime_s)
        else:
            invitation, expires_at = await who.invite(request.owner, quota, request.lifetime_s)
        return pb.InviteReply(invitation=invitation.text(), expires_at=expires_at)

    @answered
    async def ListDevices(
        self, request: pb.ListDevicesRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListDevicesReply:
        return pb.ListDevicesReply(devices=[_device(one) for one in await self._core.identities.devices()])

    @answered
    async def Revoke(self, request: pb.RevokeRequest, context: grpc.aio.ServicerContext) -> pb.Device:
        revoked = await self._core.identities.revoke(request.device)
        self._core.work.ring()
        self._core.changed.ring()
        return _device(revoked)

    @answered
    async def Thaw(self, request: pb.ThawRequest, context: grpc.aio.ServicerContext) -> pb.Device:
        return _device(await self._core.identities.thaw(request.device))

    @answered
    async def ListAdministrators(
        self, request: pb.ListAdministratorsRequest, context: grpc.aio.ServicerContext
    ) -> pb.ListAdministratorsReply:
        found = await self._core.identities.administrators()
        return pb.ListAdministratorsReply(administrators=[_administrator(one) for one in found])

    @answered
    async def RevokeAdministrator(
        self, request: pb.RevokeAdministratorRequest, context: grpc.aio.ServicerContext
    ) -> pb.Administrator:
        who, caller = self._core.identities, presented(context)
        if caller is not None and caller.name == request.name:
            raise Refused(Reason.BAD_REQUEST, "an administrator is revoked by another one: somebody has to be left")
        return _administrator(await who.revoke_administrator(request.name))


def _device(device: Device) -> pb.Device:
    times = {"enrolled_at": device.enrolled_us / 1e6, "certificate_ends_at": device.ends_us / 1e6}
    return pb.Device(name=device.name, owner=device.owner, state=device.standing, alarm=device.alarm or "", **times)


def _administrator(one: Administrator) -> pb.Administrator:
    times = {"enrolled_at": one.enrolled_us / 1e6, "certificate_ends_at": one.ends_us / 1e6}
    return pb.Administrator(name=one.name, state=one.state, **times)


def _json(text: str) -> Any:
    """Raises PayloadError, also for half a character (a lone surrogate), which nothing could keep."""
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()
        return found
    except (ValueError, RecursionError) as error:
        raise PayloadError(Reason.BAD_REQUEST, f"not JSON: {error}") from error
