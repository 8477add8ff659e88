"""A federation in one thread: the product's own coordinators over one store, the product's own clients, and whatever befalls
them. Time is virtual, chance is seeded, and the wires are those of `network.py`.

What is not the product's: its clock, its disk's latency, its network, the mathematics of training. A replica here runs the
handlers, the closing, the upload and the ledger code that `edgetune coordinator serve` runs; a device runs `participate`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import numpy as np

from coordinator import lobby, uploads
from coordinator.administration import Administration
from coordinator.bell import Bell
from coordinator.closing import close_rounds, hear_others
from coordinator.core import Core
from coordinator.meter import Meter, Times
from coordinator.service import Federation
from coordinator.stores import Store, group_commit, memory, sqlite
from coordinator.stores.group_commit import GroupCommit
from coordinator.stores.sql_ledger import SqlLedger
from coordinator.uploads import forget_expired_now_and_then
from edge_client import calls, participate, state, transport
from edge_client import uploads as client_uploads
from edge_client.methods import Trained
from edge_client.releases import Releases
from edge_client.session import Session, Work
from edge_client.state import DeviceState
from edge_client.view import View
from protos.v1 import federation_pb2_grpc as pb_grpc
from tests.faults.network import CALM, Channel, Network, Server
from tests.faults.plans import Op, Plan
from tests.faults.virtual import LIFE, Fiber, FiberTime, Killed, Life, VirtualLoop, fiber
from tests.faults.witness import Witness
from wire.contract import Action, after
from wire.delta import Delta, Layout, Tensor, Vector
from wire.errors import Reason, Refused, RemoteError
from wire.messages import Receipt
from wire.run_spec import RunSpec

LAYOUT = Layout((Tensor("w", (4, 4)),))
EPOCH_US = 1_700_000_000_000_000
PATIENCE_S = 60.0
LONGEST_S = 3_600.0
"""Virtual seconds after the storm within which every run must have ended and every device have heard of it."""


class Commits(GroupCommit):
    """The ledger's group commit without its thread: a batch waits for a disk whose time is virtual."""

    def __init__(self, world: World, life: Life) -> None:
        self._world, self._life, self._session = world, life, world.session
        self._waiting: list[Any] = []
        self._due = False

    def submit(self, work: Callable[..., Any]) -> Future[Any]:
        answer: Future[Any] = Future()
        self._waiting.append(group_commit._Job(work, answer))
        if not self._due:
            self._due = True
            self._world.loop.call_later(self._world.disk_s(), self._commit)
        return answer

    def stop(self) -> None: ...

    def _commit(self) -> None:
        life, loop = self._life, self._world.loop
        if life.stopped_until > loop.now:
            loop.call_at(life.stopped_until, self._commit)
            return
        self._due, (batch, self._waiting) = False, (self._waiting, [])
        if not life.reach("commit"):
            return _forget(batch)
        outcomes = self._outcomes(batch)
        self._world.committed(life)
        if not life.reach("commit done"):
            return _forget(batch)
        loop.call_later(self._world.disk_s(), self._answer, batch, outcomes)

    def _answer(self, batch: list[Any], outcomes: list[Any]) -> None:
        if self._life.dead:
            return _forget(batch)
        for job, outcome in zip(batch, outcomes, strict=True):
            group_commit._answer(job, outcome)


def sleep(seconds: float) -> None:
    """As blocking code does, in virtual time."""
    vars(calls)["time"].sleep(seconds)


def _forget(batch: list[Any]) -> None:
    for job in batch:
        job.answer.cancel()


class Ledger(SqlLedger):
    """A replica's ledger. Others' changes are heard of a moment later, and sometimes not at all."""

    def __init__(self, world: World, life: Life, heard: Bell, skew_us: int = 0) -> None:
        commits = Commits(world, life)
        super().__init__(commits, commits, lambda db: world.now_us(life))
        self._world, self._heard = world, heard

    async def others(self) -> AsyncIterator[bool]:
        while True:
            await self._heard.wait(self._heard.ticket(), 1e9)
            await asyncio.sleep(self._world.chance.uniform(0.0, sqlite.LOOK_S))
            if self._world.chance.random() < 0.9:
                yield True


class Blobs:
    """A replica's hold on the blobs that all share: it can die before and after each change."""

    def __init__(self, kept: memory.MemoryBlobs, life: Life) -> None:
        self._kept, self._life = kept, life

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kept, name)

    @contextlib.contextmanager
    def writer(self, digest: str | None, size: int) -> Iterator[Any]:
        with self._kept.writer(digest, size) as writer:
            yield _Writer(writer, self._life)

    def put(self, data: bytes | memoryview) -> str:
        with self.writer(None, len(data)) as writer:
            writer.write(data)
            return cast(str, writer.commit())

    def delete(self, digest: str) -> None:
        _step(self._life, "file delete")
        self._kept.delete(digest)


class GrowingBlobs(Blobs):
    """As blobs in files: what grows has a name of its own, and the same bytes under its digest when it is whole."""

    def __init__(self, kept: memory.MemoryBlobs, life: Life, held: set[str]) -> None:
        super().__init__(kept, life)
        self._held = held

    def grow(self, name: str) -> None:
        _step(self._life, "file grow")
        self._kept._kept.setdefault(name, cast(Any, [b"", 0.0]))

    @contextlib.contextmanager
    def growing(self, name: str) -> Iterator[Any]:
        if name in self._held:
            raise Refused(Reason.BUSY, "another call adds to this upload", 0.1)
        self._held.add(name)
        try:
            file = self._kept._kept.get(name)
            yield None if file is None else _Growing(cast(Any, file), self._kept._kept, self._life)
        finally:
            self._held.discard(name)


class _Growing:
    """`file` is bytes and a time, shared by all names of it."""

    def __init__(self, file: list[Any], names: dict[str, Any], life: Life) -> None:
        self._file, self._names, self._life = file, names, life

    def size(self) -> int:
        return len(self._file[0])

    def write(self, start: int, data: bytes) -> None:
        self._file[0] = self._file[0][:start] + data[: len(data) // 2]
        _step(self._life, "file half a part")
        self._file[0] += data[len(data) // 2 :]
        _step(self._life, "file part done")

    def sync(self) -> None:
        _step(self._life, "file sync")

    def finish(self, digest: str) -> None:
        _step(self._life, "file link")
        self._names.setdefault(digest, self._file)
        _step(self._life, "file link done")


class _Writer:
    def __init__(self, writer: Any, life: Life) -> None:
        self._writer, self._life, self.write = writer, life, writer.write

    def commit(self) -> str:
        _step(self._life, "file put")
        digest = self._writer.commit()
        _step(self._life, "file put done")
        return cast(str, digest)


def _step(life: Life, step: str) -> None:
    if not life.reach(step):
        raise Killed


class Replica:
    """One coordinator process, from its start to its death."""

    def __init__(self, world: World, number: int) -> None:
        self.number, self._world = number, world
        self.life = Life(f"replica{number}", world.loop)
        self.life.died = self._dying
        self.server, self.heard = Server(self.life), Bell()
        accepted, changed, work = Bell(), Bell(), Bell()
        store = Store(Ledger(world, self.life, self.heard), cast(Any, world.blobs_of(self.life)))
        core = Core(store, cast(Any, None), cast(Any, None), accepted, changed, work, Meter())
        add_services: Any = pb_grpc  # generated without annotations
        add_services.add_FederationServicer_to_server(Federation(core), self.server)
        add_services.add_AdministrationServicer_to_server(Administration(core), self.server)
        self._tasks = [
            self._task(close_rounds(store, cast(Any, None), accepted, changed, work, Times())),
            self._task(hear_others(store, changed, work)),
            self._task(forget_expired_now_and_then(store)),
        ]

    def _dying(self) -> None:
        self._world.loop.call_soon(self.die)

    def die(self) -> None:
        """Nothing of it goes on; another is started in its place."""
        self.life.dead = True
        for task in [*self._tasks, *self.server.under_way]:
            task.cancel()
        self._world.replica_died(self)

    def _task(self, work: Any) -> asyncio.Task[None]:
        context = contextvars.copy_context()
        context.run(LIFE.set, self.life)
        task: asyncio.Task[None] = self._world.loop.create_task(work, context=context)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and not self.life.dead and (error := task.exception()) is not None:
            self._world.wrong(f"{self.life.name} cannot go on: {error!r}")
            self.life.dead = True
            self.die()


class Device:
    """A client and whoever starts it again when it has ended with an error or was killed."""

    def __init__(self, world: World, name: str, train_s: float, weight: int) -> None:
        self.name, self._world, self._train_s, self._weight = name, world, train_s, weight
        self.finished, self.trained = False, 0
        self._fiber: Fiber | None = None
        self.start()

    def start(self) -> None:
        if not self.finished:
            self._fiber = Fiber(self._world.loop, self.name, self._join, self._ended)
            self._world.fibers.append(self._fiber)

    def kill(self, for_s: float) -> None:
        if self._fiber is None or self._fiber.life.dead or self.finished:
            return
        self._world.loop.say(self.name, "is killed")
        self._fiber.kill()
        self._world.network.hang_up(self._fiber.life)
        self._world.loop.call_later(for_s, self.start)

    def _join(self) -> None:
        """As `edgetune client join`."""
        kept = DeviceState(self._world.folder / self.name, self.name)
        try:
            with transport.Connection("virtual", PATIENCE_S) as connection:
                session = _Session(self)
                participate.participate(connection, session, kept, (self._world.run.name,), False, lambda *_: None)
        finally:
            if not fiber().life.dead:
                kept.close()

    def _ended(self, result: Any) -> None:
        self._fiber = None
        if result is None:
            self.finished = True
            self._world.device_finished()
            return
        if isinstance(result, RemoteError) and after(result) in (Action.RETRY, Action.RESUME):
            self._world.loop.say(self.name, f"gives up: {result}")
        else:
            self._world.wrong(f"{self.name} ends with {result!r}")
        self._world.loop.call_later(2.0, self.start)

    def vector(self, number: int) -> Vector:
        """What training gives: something else each time, as where threads race."""
        self.trained += 1
        chance = np.random.default_rng(
            [self._world.plan.seed, number, self.trained, len(self.name), ord(self.name[-1])]
        )
        return chance.normal(0, 0.1, LAYOUT.size).astype(np.float32)

    def work(self, run: RunSpec) -> Work:
        initial = np.zeros(LAYOUT.size, np.float32)
        parts = (
            run,
            View(LAYOUT),
            run.chain(),
            cast(Any, _Method(self, self._train_s)),
            _Engine(),
            Releases(),
            initial,
        )
        return Work(*parts, train=[], held_out=[], examples=self._weight)


class _Session(Session):
    """A session without a model."""

    def __init__(self, device: Device) -> None:
        super().__init__(cast(Any, None), ())
        self._simulated = device

    def _prepare(self, run: RunSpec, layout: Layout) -> Work:
        return self._simulated.work(run)


class _Engine:
    def write(self, adapter: Vector) -> None: ...

    def loss(self, held_out: list[Any]) -> tuple[float, int]:
        return 1.0, 1


class _Method:
    """Training that takes a while and learns nothing."""

    def __init__(self, device: Device, train_s: float) -> None:
        self._device, self._train_s = device, train_s

    def train(self, engine: Any, start: Any, train: Any, draw: Any, progress: Any) -> Trained:
        sleep(self._train_s)
        progress(1, 1, 1.0)
        delta = Delta(LAYOUT, self._device.vector(start.version))
        return Trained(delta, start.adapter, 1.0, 1, 1, self._train_s, 1)


class _Disk:
    """`os` for a device's state: a sync takes a moment, in which the device may be killed."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def __getattr__(self, name: str) -> Any:
        return getattr(__import__("os"), name)

    def fsync(self, handle: int) -> None:
        sleep(0.002)


class _Tokens:
    def __init__(self, chance: random.Random) -> None:
        self._chance = chance

    def token_hex(self, size: int) -> str:
        return self._chance.randbytes(size).hex()


Replacement = tuple[Any, str, Any]
"""Of what, the name, and what it is to be."""


@contextlib.contextmanager
def replaced(replacements: list[Replacement]) -> Iterator[None]:
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in replacements]
    for owner, name, value in replacements:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def seams(world: World) -> list[Replacement]:
    """This process's clock, chance and disk are the world's."""
    time = FiberTime(world.loop)
    return [
        (calls, "time", time),
        (calls, "random", random.Random(f"{world.plan.seed}/clients")),
        (calls, "channel_to", lambda address, identity: Channel(world.network)),
        (client_uploads, "time", time),
        (client_uploads, "CHUNK_BYTES", world.plan.chunk_bytes),
        (client_uploads, "PART_BYTES", 24),
        (participate, "time", time),
        (participate, "peak_rss_bytes", lambda: 0),
        (state, "os", _Disk(world.loop)),
        (state, "fcntl", None),  # the system unlocks what a dead process has locked; here nobody would
        (memory, "time", time),
        (lobby, "random", random.Random(f"{world.plan.seed}/lobby")),
        (uploads, "secrets", _Tokens(random.Random(f"{world.plan.seed}/uploads"))),
    ]


class World:
    """Everything that one plan sets going."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.run = plan, plan.run()
        self.faults: list[str] = []
        self.receipts: set[Receipt] = set()
        self.loop = VirtualLoop(plan.seed)
        asyncio.set_event_loop(self.loop)
        self.chance = random.Random(f"{plan.seed}/world")
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.session, self.blobs = sqlite._Session(Path(":memory:")), memory.MemoryBlobs()
        self.witness = Witness(self.run, self.wrong)
        self.network = Network(self.loop, plan.seed, plan.weather, self.wrong, self.heard)
        self.fibers: list[Fiber] = []
        self.replicas: list[Replica] = []
        self.devices: list[Device] = []
        self._changes, self._calm, self._over = 0, False, asyncio.Event()
        self._held: set[str] = set()
        self._closed = False
        self._administering: asyncio.Task[None] | None = None

    def now_us(self, life: Life) -> int:
        """The store's clock, the same for every process."""
        return EPOCH_US + int(self.loop.now * 1e6)

    def blobs_of(self, life: Life) -> Blobs:
        return GrowingBlobs(self.blobs, life, self._held) if self.plan.growing else Blobs(self.blobs, life)

    def disk_s(self) -> float:
        return self.chance.uniform(0.001, 0.01) if self.chance.random() < 0.99 else 1.0

    def wrong(self, fault: str) -> None:
        self.faults.append(fault)
        self.loop.say("wrong", fault)

    def heard(self, receipt: Receipt) -> None:
        """A device has it: from now on it must be true."""
        self.loop.say(receipt.device, f"has its receipt for {receipt.round}.{receipt.attempt} {receipt.digest[:6]}")
        self.receipts.add(receipt)

    def committed(self, life: Life) -> None:
        changes = self.session._db.total_changes
        if changes != self._changes:
            self._changes = changes
            self.loop.say(life.name, "commits")
            self.witness.look(self.session, EPOCH_US + int(self.loop.now * 1e6))
            for replica in self.replicas:
                if replica.life is not life:
                    replica.heard.ring()

    async def live(self) -> None:
        """From the first replica's start to the last device's end."""
        for number in range(self.plan.replicas):
            self._start_replica(number)
        await self._as_admin(lambda admin: admin.create_run(self.run, LAYOUT, np.zeros(LAYOUT.size, np.float32)))
        for number, train_s in enumerate(self.plan.train_s):
            self.devices.append(Device(self, f"d{number}", train_s, number + 1))
        for op in self.plan.ops:
            self.loop.call_later(op.at_s, self._do, op)
        self.loop.call_later(self.plan.storm_s, self._calm_down)
        try:
            async with asyncio.timeout(self.plan.storm_s + LONGEST_S):
                await self._over.wait()
        except TimeoutError:
            waiting = [device.name for device in self.devices if not device.finished]
            self.wrong(f"an hour after the last fault {', '.join(waiting)} still take part")

    def device_finished(self) -> None:
        if self.devices and all(device.finished for device in self.devices):
            self._over.set()

    def replica_died(self, dead: Replica) -> None:
        self.loop.call_later(self.chance.uniform(0.1, 3.0), self._start_replica, dead.number)

    def _start_replica(self, number: int) -> None:
        if self._closed:
            return
        replica = Replica(self, number)
        self.loop.say(replica.life.name, "starts")
        self.replicas = sorted([r for r in self.replicas if r.number != number] + [replica], key=lambda r: r.number)
        self.network.servers = [replica.server for replica in self.replicas]

    def _calm_down(self) -> None:
        """The storm is over: no more faults, and a paused run goes on."""
        self._calm = True
        self.loop.say("world", "calm")
        self.network.cut_off.clear()
        self.network.weather = dataclasses.replace(CALM, slow_s=self.plan.weather.slow_s)
        for replica in self.replicas:
            replica.life.dies_at = None
        self._admin_does("resume")

    def _do(self, op: Op) -> None:
        if self._calm:
            return
        self.loop.say("world", f"{op.kind} {op.who} {op.size:.2f}")
        getattr(self, f"_{op.kind}")(op)

    def _kill_replica(self, op: Op) -> None:
        """An odd size: at a step of a blob, of which there are fewer."""
        n = int(op.size)
        self.replicas[int(op.who)].life.dies_at = ("file", n % 8 // 2 + 1) if n % 2 else ("", n + 1)

    def _stop_replica(self, op: Op) -> None:
        self.replicas[int(op.who)].life.stopped_until = self.loop.now + op.size

    def _kill_device(self, op: Op) -> None:
        self.devices[int(op.who)].kill(op.size)

    def _cut_off(self, op: Op) -> None:
        self.network.cut_off.add(op.who)
        self.loop.call_later(op.size, self.network.cut_off.discard, op.who)

    def _pause_run(self, op: Op) -> None:
        self._admin_does("pause")
        self.loop.call_later(op.size, self._admin_does, "resume")

    def _stop_run(self, op: Op) -> None:
        self._admin_does("stop")

    def _admin_does(self, action: Any) -> None:
        """Whoever administers tries until an answer comes; a run that has ended cannot be told anything."""

        def work(admin: transport.Connection) -> None:
            with contextlib.suppress(RemoteError):
                admin.control(self.run.name, action)

        self._administering = self.loop.create_task(self._as_admin(work, self._administering))

    async def _as_admin(
        self, work: Callable[[transport.Connection], Any], before: asyncio.Task[None] | None = None
    ) -> None:
        """One thing after the other."""
        if before is not None:
            await before
        done: asyncio.Future[Any] = self.loop.create_future()

        def administer() -> None:
            while True:
                try:
                    work(transport.Connection("virtual", PATIENCE_S))
                    return
                except RemoteError as error:
                    if after(error) not in (Action.RETRY, Action.RESUME):
                        raise

        self.fibers.append(Fiber(self.loop, "admin", administer, done.set_result))
        if isinstance(error := await done, BaseException):
            self.wrong(f"the administrator is told {error!r}")

    def close(self) -> None:
        self._closed = True
        for one in self.fibers:
            one.bury()
        for task in asyncio.all_tasks(self.loop):
            task.cancel()
        for replica in self.replicas:
            replica.life.dead = True
        self.loop.run_until_complete(asyncio.sleep(0.1))
        self.session.close()
        self.loop.close()
        asyncio.set_event_loop(None)
        shutil.rmtree(self.folder, ignore_errors=True)
