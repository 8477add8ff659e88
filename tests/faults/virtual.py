"""A machine room in one thread: an event loop whose time passes only when nothing else is left to do, and processes of
blocking code that take turns on it.

A fiber is such a process: while it waits, all else goes on. One that is killed never runs again; not even its `finally`
does, as after kill -9.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
from collections.abc import Callable
from typing import Any

from greenlet import getcurrent, greenlet


class Life:
    """A process that can die, at a named step if so wished, or be stopped for a while."""

    def __init__(self, name: str, loop: VirtualLoop) -> None:
        self.name, self.dead, self.stopped_until = name, False, 0.0
        self.dies_at: tuple[str, int] | None = None
        """How the steps begin of which the n-th is the last."""
        self.died: Callable[[], None] = lambda: None
        self._loop = loop

    def reach(self, step: str) -> bool:
        """Whether the process lives on after this step."""
        if self.dead:
            return False
        if self._is_last(step):
            self.dead = True
            self._loop.say(self.name, f"dies at {step}")
            self.died()
        return not self.dead

    def _is_last(self, step: str) -> bool:
        if self.dies_at is None or not step.startswith(self.dies_at[0]):
            return False
        self.dies_at = (self.dies_at[0], self.dies_at[1] - 1)
        return self.dies_at[1] == 0


LIFE: contextvars.ContextVar[Life] = contextvars.ContextVar("life")
"""Whose task this is."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """Its clock jumps to the next timer. What goes to an executor is done on the spot, a moment later."""

    def __init__(self, seed: int) -> None:
        self.now = 1_000.0
        self.trace: list[str] = []
        self._chance = random.Random(f"{seed}/executors")
        super().__init__(_Jump(self))  # type: ignore[arg-type]  # as much of a selector as the loop uses

    def time(self) -> float:
        return self.now

    def say(self, who: str, what: str) -> None:
        self.trace.append(f"{self.now - 1_000:9.3f} {who:8} {what}")

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        done: asyncio.Future[Any] = self.create_future()
        self.call_later(self._chance.uniform(0.0005, 0.01), self._perform, LIFE.get(None), done, func, args)
        return done

    def _perform(self, life: Life | None, done: asyncio.Future[Any], func: Callable[..., Any], args: Any) -> None:
        if life is not None and life.stopped_until > self.now:
            self.call_at(life.stopped_until, self._perform, life, done, func, args)
            return
        if done.cancelled() or (life is not None and life.dead):
            done.cancel()
            return
        try:
            result = func(*args)
        except Exception as error:
            _fail(done, error)
        except Killed:
            done.cancel()
        else:
            if not done.done():
                done.set_result(result)

    def _make_self_pipe(self) -> None:
        """Nobody calls from another thread."""

    def _close_self_pipe(self) -> None: ...

    def _write_to_self(self) -> None: ...


def _fail(done: asyncio.Future[Any], error: Exception) -> None:
    if not done.done():
        done.set_exception(error)


class _Jump:
    """What a selector is to the loop: here nothing ever arrives from outside."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> list[Any]:
        if timeout is None:
            raise AssertionError("nothing is left that could ever happen")
        self._loop.now += timeout
        return []

    def close(self) -> None: ...


class Killed(BaseException):
    """What a dead process would have done next."""


class Fiber:
    """A process of blocking code. `ended` is told its result or its exception."""

    def __init__(self, loop: VirtualLoop, name: str, work: Callable[[], Any], ended: Callable[[Any], None]) -> None:
        self.life, self._loop, self._work, self._ended = Life(name, loop), loop, work, ended
        self._greenlet = _Greenlet(self._run)
        self._greenlet.fiber = self
        loop.call_soon(self._resume)

    def kill(self) -> None:
        """As kill -9."""
        self.life.dead = True

    def bury(self) -> None:
        """Free what a dead one holds, when nobody looks any more."""
        self.life.dead = True
        self._ended = lambda result: None
        if self._greenlet and not self._greenlet.dead:
            self._greenlet.throw(Killed)

    def wait(self, future: asyncio.Future[Any]) -> Any:
        """From within: the future's result, once it is there."""
        if self.life.dead:
            raise Killed
        future.add_done_callback(lambda _: self._resume())
        getcurrent().parent.switch()  # type: ignore[union-attr]  # only the loop's own has none
        if self.life.dead:
            raise Killed
        return future.result()

    def _resume(self) -> None:
        if not self.life.dead:
            self._greenlet.switch()

    def _run(self) -> None:
        try:
            result = self._work()
        except Killed:
            return
        except BaseException as error:
            result = error
        self._ended(result)


class _Greenlet(greenlet):
    fiber: Fiber


def fiber() -> Fiber:
    """The one that is running."""
    found = getcurrent()
    assert isinstance(found, _Greenlet), "blocking code runs in a fiber"
    return found.fiber


class FiberTime:
    """`time` as blocking code sees it."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def monotonic(self) -> float:
        return self._loop.now

    def sleep(self, seconds: float) -> None:
        done: asyncio.Future[None] = self._loop.create_future()
        self._loop.call_later(seconds, done.set_result, None)
        fiber().wait(done)
