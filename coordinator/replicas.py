"""`--replicas N`: N coordinator processes on the same ports, each with store and identities opened for itself.

The parent serves nothing and keeps nothing but the ports. A replica that dies is said so and replaced; the others go on,
and what it had under way its callers send again. If the parent dies, the replicas drain and end.
"""

from __future__ import annotations

import asyncio
import dataclasses
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from types import FrameType

from coordinator import claims
from coordinator.authority import Authority
from coordinator.events import last_words
from coordinator.identities import Doors
from coordinator.serve import DRAIN_S, Serving, serve
from coordinator.stores import Place
from wire import addresses
from wire.errors import EdgetuneError, MachineError

Tell = Callable[[str, dict[str, object]], None]
LOOK_S = 0.2
START_S = 60.0
SHORT_LIFE_S = 10.0
"""A replica that ended sooner is replaced after a pause that doubles, up to `LONGEST_PAUSE_S`."""
LONGEST_PAUSE_S = 30.0
_processes = multiprocessing.get_context("spawn")


def serve_together(place: Place, how: Serving, count: int, ready: Callable[[Doors], None], tell: Tell) -> None:
    """Serve with `count` processes until SIGTERM or SIGINT; `ready` gets the addresses once all of them serve. The first
    shows its numbers at `how.metrics`, each further one a port higher.

    Raises what opening the store raises, IdentityError for a store of other identities, and MachineError if an address is
    taken or no replica starts.
    """
    asyncio.run(_looked_at(place, how))  # what is wrong with the store is said once, here
    with ExitStack() as ports:
        doors = Doors(*[_kept(listen, ports) for listen in dataclasses.astuple(how.listen)])
        Replicas(place, dataclasses.replace(how, listen=doors, replicas=count), tell).run(count, ready)


async def _looked_at(place: Place, how: Serving) -> None:
    store = place.open()
    try:
        await claims.check(store.ledger, Authority(how.trust.folder) if how.trust else None)
    finally:
        await store.ledger.close()


def _kept(listen: str, ports: ExitStack) -> str:
    """The address with the port that is reserved while `ports` is open; none for none."""
    if not listen:
        return ""
    port = ports.enter_context(closing(_reserved(listen))).getsockname()[1]
    return addresses.joined(addresses.parse(listen)[0], port)


def _reserved(listen: str) -> socket.socket:
    """A socket that holds the port for replicas to share. It never listens, so no caller is ever given to it."""
    host, port = addresses.parse(listen)
    if not hasattr(socket, "SO_REUSEPORT"):
        raise MachineError("--replicas: processes of this system cannot share a port; start them on ports of their own")
    try:
        family, _, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as alone:  # fails if anybody is there, replicas of another coordinator included
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            alone.bind(where)
            alone.listen()
        held = socket.socket(family)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind(where)
        return held
    except OSError as error:
        raise MachineError(
            f"cannot listen on {listen}: the port is in use or the address is not this machine's"
        ) from error


@dataclasses.dataclass(frozen=True)
class _Replica:
    process: SpawnProcess
    serving: Connection
    """Has something to read once the replica serves."""
    since: float


class Replicas:
    """The parent's half: starts replicas, replaces those that die, stops them all."""

    def __init__(self, place: Place, how: Serving, tell: Tell) -> None:
        self._place, self._how, self._tell = place, how, tell
        self._running: dict[int, _Replica] = {}
        self._pauses: dict[int, float] = {}
        self._due: dict[int, float] = {}
        self._stopping = False

    def run(self, count: int, ready: Callable[[Doors], None]) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        try:
            for replica in range(1, count + 1):
                self._start(replica)
            self._await_all()
            if not self._stopping:
                ready(self._how.listen)
            while not self._stopping:
                self._replace_dead()
        finally:
            self._end_all()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopping = True

    def _start(self, replica: int) -> None:
        serving, told = _processes.Pipe(duplex=False)
        process = _processes.Process(
            target=_serve_one,
            args=(self._place, self._own(replica), told),
            name=f"replica-{replica}",
            daemon=True,
        )
        process.start()
        told.close()
        self._running[replica] = _Replica(process, serving, time.monotonic())
        self._tell("replica_started", {"replica": replica, "pid": process.pid})

    def _own(self, replica: int) -> Serving:
        """How one of them serves: all alike, but each with its own numbers."""
        shown = self._how.metrics and higher(self._how.metrics, replica - 1)
        return dataclasses.replace(self._how, metrics=shown)

    def _await_all(self) -> None:
        for one in self._running.values():
            if not one.serving.poll(START_S):
                raise MachineError(f"a replica does not serve after {START_S:.0f} s")
            try:
                one.serving.recv_bytes()
            except EOFError:
                if not self._stopping:
                    raise MachineError("a replica did not start; what it said stands above") from None

    def _replace_dead(self) -> None:
        wait([one.process.sentinel for one in self._running.values()], LOOK_S)
        now = time.monotonic()
        for replica, one in list(self._running.items()):
            if one.process.exitcode is not None and not self._stopping:
                self._tell("replica_ended", {"replica": replica, "pid": one.process.pid, "code": one.process.exitcode})
                one.serving.close()
                del self._running[replica]
                self._due[replica] = now + self._pause_s(replica, now - one.since)
        for replica in [replica for replica, due in self._due.items() if due <= now and not self._stopping]:
            del self._due[replica]
            self._start(replica)

    def _pause_s(self, replica: int, lived_s: float) -> float:
        """None for one that had served for a while, nor after its first short life."""
        pause_s = 0.0 if lived_s > SHORT_LIFE_S else self._pauses.get(replica, 0.0)
        self._pauses[replica] = 0.0 if lived_s > SHORT_LIFE_S else min(max(2 * pause_s, 0.5), LONGEST_PAUSE_S)
        return pause_s

    def _end_all(self) -> None:
        """SIGTERM drains them; what has not ended well after the drain's bound is killed."""
        processes = [one.process for one in self._running.values()]
        for process in processes:
            process.terminate()
        give_up = time.monotonic() + DRAIN_S + 5
        for process in processes:
            process.join(max(0.0, give_up - time.monotonic()))
            process.kill()
            process.join()


def higher(address: str, ports: int) -> str:
    """The address that many ports higher; port 0, any that is free, stays so. Raises UserError above the last.

    >>> higher("127.0.0.1:9464", 2), higher("[::1]:0", 1)
    ('127.0.0.1:9466', '[::1]:0')
    """
    host, port = addresses.parse(address)
    return addresses.joined(*addresses.parse(addresses.joined(host, port + ports if port else 0)))


def _serve_one(place: Place, how: Serving, told: Connection) -> None:
    """One process: as `coordinator serve`, on a shared port, for as long as its parent lives."""
    threading.Thread(target=_follow_parent, daemon=True).start()
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    try:
        asyncio.run(serve(place.open(), how, lambda _: told.send_bytes(b"serving")))
    except EdgetuneError as error:
        print(last_words(how.log, error), file=sys.stderr, flush=True)
        sys.exit(error.exit_code)


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a replica is started by its parent"
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
