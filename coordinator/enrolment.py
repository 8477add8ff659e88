"""How devices get their certificates."""

from __future__ import annotations

import time

import grpc

from coordinator.addresses import of_peer
from coordinator.callers import presented_pem
from coordinator.core import Core, answered
from coordinator.identities import Identities
from coordinator.rates import Rate, Tries
from protos.v1 import federation_pb2 as pb
from protos.v1 import federation_pb2_grpc as pb_grpc
from wire import addresses
from wire.errors import Reason, Refused

EACH, TOGETHER = Rate(60.0, 1.0), Rate(300.0, 20.0)
"""Calls on the enrolment port; a device needs two, and many may come from one address at once."""


class Enrolment(pb_grpc.EnrolmentServicer):
    """The service of that name."""

    def __init__(self, core: Core) -> None:
        self._core, self._tries = core, Tries(EACH, TOGETHER)

    def _try(self, context: grpc.aio.ServicerContext) -> None:
        """What anyone may call is not called without end. Raises Refused."""
        self._tries.take(of_peer(context.peer()), time.monotonic())

    @answered
    async def Authority(self, request: pb.AuthorityRequest, context: grpc.aio.ServicerContext) -> pb.AuthorityReply:
        self._try(context)
        return pb.AuthorityReply(certificate_pem=self._core.identities.authority.certificate)

    @answered
    async def Enroll(self, request: pb.EnrollRequest, context: grpc.aio.ServicerContext) -> pb.EnrollReply:
        self._try(context)
        who = self._core.identities
        return _enrolled(who, await who.enroll(request.token, request.device, request.request_pem))

    @answered
    async def Renew(self, request: pb.RenewRequest, context: grpc.aio.ServicerContext) -> pb.EnrollReply:
        who, pem = self._core.identities, presented_pem(context)
        if pem is None:
            raise Refused(Reason.NOT_ENROLLED, "a certificate is renewed by the one that it follows")
        return _enrolled(who, await who.renew(pem))


def _enrolled(who: Identities, certificate: str) -> pb.EnrollReply:
    _, port = addresses.parse(who.doors.devices)
    return pb.EnrollReply(certificate_pem=certificate, release_key=who.authority.release_key, port=port)
