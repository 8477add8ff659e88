"""One coordinator process: bind, serve, close rounds, drain on SIGTERM."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from coordinator.bell import Bell
from coordinator.closing import close_rounds, hear_others
from coordinator.service import Administration, Core, Federation
from coordinator.stores import Store
from coordinator.uploads import forget_expired_now_and_then
from protos.v1 import federation_pb2_grpc as pb_grpc
from wire.errors import MachineError
from wire.messages import MAX_MESSAGE_BYTES

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


async def serve(store: Store, listen: str, ready: Callable[[str], None], shared: bool = False) -> None:
    """Serve until SIGTERM or SIGINT; `ready` gets the bound address. `shared`: other replicas listen there too.

    Raises MachineError if `listen` is taken.
    """
    keep_freed_memory()
    changed, work = Bell(), Bell()
    with ThreadPoolExecutor(1, "compute") as compute, ThreadPoolExecutor(4, "disk") as disk:
        core = Core(store, compute, disk, changed, work)
        # a second coordinator on the same port must fail, not share it by accident
        server = grpc.aio.server(options=[("grpc.so_reuseport", int(shared)), *OPTIONS])
        pb_grpc.add_FederationServicer_to_server(Federation(core), server)
        pb_grpc.add_AdministrationServicer_to_server(Administration(core), server)
        checks = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        address = _bind(server, listen)
        await server.start()
        await checks.set("", health_pb2.HealthCheckResponse.SERVING)
        tasks = [
            asyncio.create_task(close_rounds(store, compute, changed, work)),
            asyncio.create_task(hear_others(store, changed, work)),
            asyncio.create_task(forget_expired_now_and_then(store)),
        ]
        ready(address)
        try:
            await _until_stopped(tasks)
        finally:
            await checks.enter_graceful_shutdown()
            core.drain()
            await server.stop(DRAIN_S)
            await _cancelled(tasks)
            await store.ledger.close()


def _bind(server: grpc.aio.Server, listen: str) -> str:
    host, separator, port = listen.rpartition(":")
    if not separator or not port.isdigit():
        raise MachineError(f"--listen {listen}: expected HOST:PORT")
    try:
        bound = server.add_insecure_port(listen)
    except RuntimeError as error:
        raise MachineError(
            f"cannot listen on {listen}: the port is in use or the address is not this machine's"
        ) from error
    return f"{host}:{bound}"


async def _until_stopped(tasks: list[asyncio.Task[None]]) -> None:
    """Until a signal, or until a task failed: a coordinator that cannot publish must not go on taking updates."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
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
