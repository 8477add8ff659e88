"""gRPC without a network: the generated stubs call the generated handlers, and chance decides what arrives.

A message may come late, twice, or never; so may its answer, when all has been done that was asked for. Who calls a process
that is not there is told so at once, as by a closed port.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import random
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from typing import Any

import grpc

from protos.v1 import federation_pb2 as pb
from tests.faults.virtual import LIFE, Life, VirtualLoop, fiber
from wire.messages import Receipt


@dataclasses.dataclass(frozen=True)
class Weather:
    """Chances of a call in [0, 1], times in seconds."""

    lost: float = 0.0
    answer_lost: float = 0.0
    twice: float = 0.0
    cut: float = 0.0
    """In the middle: its handler is cancelled."""
    slow_s: float = 0.02
    damaged: float = 0.0


CALM = Weather()
KEEPALIVE_S = 15.0
"""After which a connection that is silent is given up, if no deadline came before."""


class Broken(grpc.RpcError):  # type: ignore[misc]  # grpc ships no types
    """A call that failed, as a client sees it."""

    def __init__(self, code: grpc.StatusCode, details: str, metadata: Any = ()) -> None:
        super().__init__(f"{code.name}: {details}")
        self._code, self._details, self._metadata = code, details, metadata

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return self._details

    def trailing_metadata(self) -> Any:
        return self._metadata


class _Aborted(Exception):
    def __init__(self, status: Any) -> None:
        super().__init__(status.details)
        self.status = status


class _Context:
    """All that handlers ask of a call's context."""

    def auth_context(self) -> dict[str, list[bytes]]:
        """No certificates here."""
        return {}

    def set_compression(self, compression: Any) -> None: ...

    def disable_next_message_compression(self) -> None: ...

    async def send_initial_metadata(self, metadata: Any) -> None: ...

    async def abort_with_status(self, status: Any) -> None:
        raise _Aborted(status)


class _InOrder(dict[asyncio.Task[Any], None]):
    """Tasks that are under way, in the order of their start: a set's order would depend on where they lie in memory."""

    def keep(self, task: asyncio.Task[Any]) -> None:
        self[task] = None
        task.add_done_callback(self.pop)


class Server:
    """One process's handlers; what the generated `add_…_to_server` wants."""

    def __init__(self, life: Life) -> None:
        self.life, self._methods = life, dict[str, Any]()
        self.under_way = _InOrder()

    def add_generic_rpc_handlers(self, handlers: Any) -> None: ...

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        self._methods.update({f"/{service}/{name}": handler for name, handler in handlers.items()})

    def answer(self, loop: VirtualLoop, path: str, messages: list[bytes]) -> asyncio.Task[list[bytes]]:
        """Call a handler in a task of this process."""
        context = contextvars.copy_context()
        context.run(LIFE.set, self.life)
        task = loop.create_task(self._answered(path, messages), context=context)
        self.under_way.keep(task)
        return task

    async def _answered(self, path: str, messages: list[bytes]) -> list[bytes]:
        method = self._methods[path]
        read, write = method.request_deserializer, method.response_serializer
        arrived = [read(message) for message in messages]
        if method.stream_unary:
            return [write(await method.stream_unary(_one_by_one(arrived), _Context()))]
        if method.unary_stream:
            return [write(reply) async for reply in method.unary_stream(arrived[0], _Context())]
        return [write(await method.unary_unary(arrived[0], _Context()))]


async def _one_by_one(messages: Iterable[Any]) -> AsyncIterator[Any]:
    for message in messages:
        yield message
        await asyncio.sleep(0.001)


class Network:
    """Everybody's calls to whichever of the servers takes them."""

    def __init__(
        self,
        loop: VirtualLoop,
        seed: int,
        weather: Weather,
        wrong: Callable[[str], None],
        heard: Callable[[Receipt], None],
    ) -> None:
        self.heard = heard
        self.weather, self.servers, self.cut_off = weather, list[Server](), set[str]()
        self._loop, self._chance, self._wrong = loop, random.Random(f"{seed}/network"), wrong
        self._calls: dict[Life, _InOrder] = {}
        self._repeats = _InOrder()

    def call(self, path: str, messages: list[bytes], timeout_s: float) -> list[bytes]:
        """From a fiber. Raises Broken."""
        caller = fiber()
        task = self._loop.create_task(self._carried(caller.life, path, messages, timeout_s))
        self._calls.setdefault(caller.life, _InOrder()).keep(task)
        answer: list[bytes] = caller.wait(task)
        return answer

    def hang_up(self, life: Life) -> None:
        """The caller has died: its servers notice."""
        for task in list(self._calls.pop(life, _InOrder())):
            task.cancel()

    async def _carried(self, caller: Life, path: str, messages: list[bytes], timeout_s: float) -> list[bytes]:
        try:
            async with asyncio.timeout(timeout_s):
                return await self._fated(caller, path, messages)
        except TimeoutError as error:
            raise Broken(grpc.StatusCode.DEADLINE_EXCEEDED, "nothing came back") from error

    async def _fated(self, caller: Life, path: str, messages: list[bytes]) -> list[bytes]:
        name, weather = path.rpartition("/")[2], self.weather
        await asyncio.sleep(self._chance.uniform(0.001, weather.slow_s))
        server = self._chance.choice(self.servers)
        if caller.name in self.cut_off or server.life.name in self.cut_off or self._happens(weather.lost):
            await self._silence("no way there")
        if server.life.dead:
            raise Broken(grpc.StatusCode.UNAVAILABLE, "nobody listens there")
        await self._stopped(server.life)
        self._loop.say(caller.name, f"{name} → {server.life.name}")
        if self._happens(weather.damaged):
            messages = [_damaged(message) if name == "AppendUpload" else message for message in messages]
        if name != "ControlRun" and self._happens(weather.twice):  # a pause repeated after the resume is a pause
            self._again(name, path, messages)
        answering = server.answer(self._loop, path, messages)
        if self._happens(weather.cut):
            self._loop.call_later(self._chance.uniform(0.0, 0.03), answering.cancel)
        replies = await self._outcome(answering, name)
        await self._stopped(server.life)
        if self._happens(weather.answer_lost) or caller.name in self.cut_off:
            self._loop.say(caller.name, f"{name}: the answer is lost")
            await self._silence("the answer is lost")
        await asyncio.sleep(self._chance.uniform(0.001, weather.slow_s))
        return replies

    async def _outcome(self, answering: asyncio.Task[list[bytes]], name: str) -> list[bytes]:
        try:
            return await answering
        except _Aborted as no:
            raise Broken(no.status.code, no.status.details, no.status.trailing_metadata) from no
        except asyncio.CancelledError:
            if answering.cancelled() and not _cancelling():
                raise Broken(grpc.StatusCode.UNAVAILABLE, "the connection broke") from None
            answering.cancel()
            raise
        except Exception as error:
            self._wrong(f"{name} raised {error!r}")
            raise Broken(grpc.StatusCode.UNKNOWN, repr(error)) from error

    def _again(self, name: str, path: str, messages: list[bytes]) -> None:
        """The same call once more, somewhere, some time; whoever sent it has gone."""
        server = self._chance.choice(self.servers)

        async def repeated() -> None:
            await asyncio.sleep(self._chance.choice([0.0, 0.01, 0.5, 5.0]))
            if not server.life.dead:
                self._loop.say("network", f"{name} → {server.life.name} again")
                try:
                    await self._outcome(server.answer(self._loop, path, messages), name)
                except Broken:
                    return

        self._repeats.keep(self._loop.create_task(repeated()))

    async def _silence(self, why: str) -> None:
        """The caller hears at once, or when its own patience ends."""
        if self._happens(0.5):
            await asyncio.sleep(KEEPALIVE_S)
        raise Broken(grpc.StatusCode.UNAVAILABLE, why)

    async def _stopped(self, life: Life) -> None:
        while life.stopped_until > self._loop.now:
            await asyncio.sleep(life.stopped_until - self._loop.now)

    def _happens(self, chance: float) -> bool:
        return chance > 0 and self._chance.random() < chance


def _cancelling() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _damaged(message: bytes) -> bytes:
    """The last byte flipped: of a part, one of its data."""
    return message[:-1] + bytes([message[-1] ^ 1])


class Channel:
    """A client's half; what the generated stubs want."""

    def __init__(self, network: Network) -> None:
        self._network = network

    def unary_unary(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def call(request: Any, timeout: float) -> Any:
            reply = response_deserializer(self._network.call(path, [request_serializer(request)], timeout)[0])
            if isinstance(reply, pb.Receipt):
                self._network.heard(Receipt.from_proto(reply))
            if isinstance(reply, pb.UploadState) and reply.HasField("receipt"):
                self._network.heard(Receipt.from_proto(reply.receipt))
            return reply

        return call

    def stream_unary(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def call(requests: Iterator[Any], timeout: float) -> Any:
            messages = [request_serializer(request) for request in requests]
            return response_deserializer(self._network.call(path, messages, timeout)[0])

        return call

    def unary_stream(self, path: str, request_serializer: Any, response_deserializer: Any, **_: Any) -> Any:
        def call(request: Any, timeout: float) -> Iterator[Any]:
            replies = self._network.call(path, [request_serializer(request)], timeout)
            return iter([response_deserializer(reply) for reply in replies])

        return call

    def close(self) -> None: ...
