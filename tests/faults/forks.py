"""How the processes of a schedule or a sweep are made: forks of one that has loaded what all of them need, and that has no
threads and no gRPC of its own. A process then starts in milliseconds, and kill -9 ends a real one."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, TypeVar

from coordinator.rules import Rules
from wire.delta import Layout
from wire.errors import EdgetuneError
from wire.run_spec import RunSpec

T = TypeVar("T")


def warm_up(run: RunSpec, layout: Layout) -> None:
    """Load here what every process would load for itself, and let forks share it."""
    Rules.of(run, layout)
    for module in ("coordinator.stores.s3", "coordinator.stores.postgresql"):
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    gc.collect()
    gc.freeze()


def alone(work: Callable[..., None], *given: Any, log: Path | None = None) -> int:
    """Run in a fork; its process. What it prints goes to `log`. It ends with 0, or 3 after an error of ours, or 4."""

    def work_alone() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        work(*given)

    return _fork(work_alone, log)


def _fork(work: Callable[[], None], log: Path | None = None) -> int:
    """A fork that does `work` and ends. No signal is handled meanwhile: what a handler raises in the callbacks of a fork is lost,
    and what it raises in a new process before its work would tidy up what is its parent's."""
    sys.stderr.flush()
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    pid = os.fork()
    if pid == 0:
        _forked(work, log)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    return pid


def _forked(work: Callable[[], None], log: Path | None) -> None:
    """All that this process still does."""
    code = 4
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
        if log is not None:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
        work()
        code = 0
    except EdgetuneError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        code = 3
    except SystemExit:
        code = 143  # it was told to end, and has ended what it had started
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    """How it ended, once it has, as `os.waitstatus_to_exitcode` says it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def side_by_side(work: Callable[[T], Any], given: Iterable[T], most: int) -> Iterator[Any]:
    """What `work` says of each, in their order: each in a fork, `most` at a time. Those under way end with the iteration."""
    left, running, said = iter(given), set[int](), deque[tuple[int, IO[str]]]()
    try:
        while True:
            for one in islice(left, most - len(running)):
                answer: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed when it has been read
                running.add(pid := _started(work, one, answer))
                said.append((pid, answer))
            if not said:
                return
            running.discard(_next_ended(running))
            while said and said[0][0] not in running:
                with said.popleft()[1] as answer:
                    answer.seek(0)
                    yield json.load(answer)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGTERM)
        for pid in running:
            os.waitpid(pid, 0)


def _started(work: Callable[[T], Any], given: T, answer: IO[str]) -> int:
    """As `alone`, but it hears SIGTERM as its parent does, to end what it has started itself."""

    def tell() -> None:
        json.dump(work(given), answer)
        answer.flush()

    return _fork(tell)


def _next_ended(running: set[int]) -> int:
    pid = 0
    while pid not in running:  # a server that this process has started may end, too
        pid, status = os.wait()
    if status:
        running.discard(pid)
        raise RuntimeError(f"what was played side by side ended with {os.waitstatus_to_exitcode(status)}")
    return pid
