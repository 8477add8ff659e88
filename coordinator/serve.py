"""One coordinator process: bind, serve, close rounds, drain on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import dataclasses
import gc
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from coordinator import claims, telemetry
from coordinator.administration import Administration
from coordinator.authority import Authority
from coordinator.bell import Bell
from coordinator.calls import Counted
from coordinator.closing import close_rounds, hear_others
from coordinator.core import Core
from coordinator.enrolment import Enrolment
from coordinator.events import Format, Lines
from coordinator.gate import Gate
from coordinator.identities import Doors, Identities, Trust
from coordinator.meter import Meter, timed
from coordinator.service import Federation
from coordinator.stores import Store
from coordinator.threads import on
from coordinator.uploads import forget_expired_now_and_then
from protos.v1 import federation_pb2_grpc as pb_grpc
from wire import addresses
from wire.errors import MachineError
from wire.messages import MAX_MESSAGE_BYTES

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

DRAIN_S = 5.0
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 8192),
    ("grpc.http2.bdp_probe", 0),  # else each connection's window grows to megabytes, and memory with their number
    ("grpc.http2.lookahead_bytes", 128 << 10),  # the window instead: 1.3 MB/s a device at 100 ms
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 30_000),
    ("grpc.keepalive_permit_without_calls", 1),
]


@dataclasses.dataclass(frozen=True)
class Serving:
    """How a process serves: where it listens, whom it trusts (None: there is one door, and it is open), where it shows its
    own numbers (None: nowhere), how many replicas listen there too (0: it does not let any), and how it says what happens."""

    listen: Doors
    trust: Trust | None = None
    metrics: str | None = None
    replicas: int = 0
    log: Format = "text"


async def serve(store: Store, how: Serving, ready: Callable[[Doors], None]) -> None:
    """Serve until SIGTERM or SIGINT; `ready` gets the bound addresses.

    With identities every call needs a certificate, but for those of the enrolment door, where devices get theirs. Raises
    MachineError if an address is taken, IdentityError for identities that cannot be read or that are not the store's,
    MissingExtra where the environment asks for spans that nothing here can make.
    """
    keep_freed_memory()
    gc.freeze()  # what is loaded by now stays: no later collection need look at it
    with telemetry.tracing() as tracer:
        await _serve(store, how, ready, tracer)


async def _serve(store: Store, how: Serving, ready: Callable[[Doors], None], tracer: Tracer | None) -> None:
    meter, accepted, changed, work = telemetry.meter(tracer), Bell(), Bell(), Bell()
    store = dataclasses.replace(store, ledger=timed(store.ledger, meter))
    events = Lines(how.log)
    who = how.trust.over(store.ledger, meter, events) if how.trust else None
    await claims.check(store.ledger, who.authority if who else None)
    with (
        ThreadPoolExecutor(1, "compute") as compute,
        ThreadPoolExecutor(4, "disk") as disk,
        _shown(meter, store, how.metrics),
    ):
        core = Core(
            store, compute, disk, accepted, changed, work, meter, who, events=events, replicas=max(1, how.replicas)
        )
        # a second coordinator on the same port must fail, not share it by accident
        options = [("grpc.so_reuseport", int(how.replicas > 0)), *OPTIONS]
        server = grpc.aio.server(options=options, interceptors=_interceptors(core, tracer))
        pb_grpc.add_FederationServicer_to_server(Federation(core), server)
        pb_grpc.add_AdministrationServicer_to_server(Administration(core), server)
        pb_grpc.add_EnrolmentServicer_to_server(Enrolment(core), server)
        checks = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        doors = _open(server, how.listen, who)
        await server.start()
        await checks.set("", health_pb2.HealthCheckResponse.SERVING)
        tasks = [
            asyncio.create_task(close_rounds(store, compute, accepted, changed, work, meter.combining, who, events)),
            asyncio.create_task(hear_others(store, changed, work)),
            asyncio.create_task(forget_expired_now_and_then(store)),
        ]
        if who is None:
            tasks.append(asyncio.create_task(claims.stay_unclaimed(store.ledger)))
        await warn_of_little_room(core)
        stop = _signalled()  # before anybody is told that it may be stopped
        ready(doors)
        try:
            await _until_stopped(stop, tasks)
        finally:
            await checks.enter_graceful_shutdown()
            events("draining")
            core.drain()
            await server.stop(DRAIN_S)
            await _cancelled(tasks)
            await store.ledger.close()


async def warn_of_little_room(core: Core) -> None:
    """Before the first caller is told."""
    free, reserve = await on(core.disk, core.store.blobs.free_bytes), core.guards.limits.disk_reserve_bytes
    if free is not None and free < reserve:
        core.events("little_room", free=free, reserve=reserve)


def _interceptors(core: Core, tracer: Tracer | None) -> list[grpc.aio.ServerInterceptor]:
    """From the outside in."""
    traced = [telemetry.TracedCalls(tracer)] if tracer else []
    gate = [Gate(core.who, core.refusals)] if core.who else []
    return [*traced, Counted(core.meter), *gate]


def _shown(meter: Meter, store: Store, address: str | None) -> contextlib.AbstractContextManager[None]:
    if address is None:
        return contextlib.nullcontext()
    from coordinator import metrics

    return metrics.shown(meter, store.ledger, address)


def _open(server: grpc.aio.Server, listen: Doors, who: Identities | None) -> Doors:
    if who is None:
        return Doors(_bind(server, listen.devices, None))
    devices = _bind(server, listen.devices, _credentials(who.authority, for_anyone=False))
    who.doors = Doors(devices, _bind(server, listen.enrolment, _credentials(who.authority, for_anyone=True)))
    return who.doors


def _credentials(authority: Authority, for_anyone: bool) -> grpc.ServerCredentials:
    """TLS with the server's certificate of the hour; at the enrolment door with one that stays. grpcio either demands a
    client's certificate or cannot see one: hence two ports."""

    def current() -> tuple[str, str]:
        return authority.enrolment if for_anyone else authority.server()

    shown = current()

    def configuration() -> grpc.ServerCertificateConfiguration:
        key, certificate = (pem.encode() for pem in shown)
        roots = None if for_anyone else authority.certificate.encode()
        return grpc.ssl_server_certificate_configuration([(key, certificate)], roots)

    def renewed() -> grpc.ServerCertificateConfiguration | None:
        """Asked at every handshake: None while nothing has changed."""
        nonlocal shown
        if current() == shown:
            return None
        shown = current()
        return configuration()

    return grpc.dynamic_ssl_server_credentials(configuration(), renewed, require_client_authentication=not for_anyone)


def _bind(server: grpc.aio.Server, listen: str, credentials: grpc.ServerCredentials | None) -> str:
    host, _ = addresses.parse(listen)  # gRPC takes port 99999 for another one, and listens there
    try:
        bound = server.add_secure_port(listen, credentials) if credentials else server.add_insecure_port(listen)
    except RuntimeError as error:
        raise MachineError(
            f"cannot listen on {listen}: the port is in use or the address is not this machine's"
        ) from error
    return addresses.joined(host, bound)


def _signalled() -> asyncio.Event:
    """Set by SIGTERM and SIGINT from now on."""
    stop, loop = asyncio.Event(), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


async def _until_stopped(stop: asyncio.Event, tasks: list[asyncio.Task[None]]) -> None:
    """Until a signal, or until a task failed: a coordinator that cannot publish must not go on taking updates."""
    stopped = asyncio.create_task(stop.wait())
    done, _ = await asyncio.wait([stopped, *tasks], return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    for task in done:
        task.result()


async def _cancelled(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def keep_freed_memory() -> None:
    """Tell glibc to reuse large blocks: uploads of 0.3 to 3 MB then cost a third of the CPU. No-op elsewhere."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD: no mapping, hence no page faults, for each large block
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: freed memory stays with the process
