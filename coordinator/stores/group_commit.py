"""Group commit: one thread, one connection, one transaction for all the requests that wait.

A commit costs one sync of a disk (milliseconds), so the thread takes whatever requests wait, runs each under its own
savepoint in one transaction, and answers them together once that is durable. What an engine calls a conflict, a lock
that is held or a connection that is lost undoes the whole transaction, and it is run again from the start: every job
is a function of the rows it reads, and of nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError
from typing import Any, Protocol, TypeVar

from coordinator.stores.connection import Connection

T = TypeVar("T")
GROUP = 64
"""Requests answered by one commit at most."""
TRY_FOR_S = 20.0
"""How long a transaction is tried again: shorter than any call's deadline, so that its caller still hears why."""


class Session(Connection, Protocol):
    """A connection of one engine, used by one thread at a time."""

    @property
    def errors(self) -> type[Exception]:
        """The root of what the engine raises."""

    def begin(self) -> None:
        """Start a transaction that sees and makes changes as if it were alone; connects again if need be."""

    def commit(self) -> None: ...

    def rollback(self) -> None:
        """Undo whatever is open. Never raises."""

    def close(self) -> None: ...

    def again(self, error: Exception) -> float | None:
        """Seconds to pause at most before the transaction is tried again; None if that would be no use."""

    def spoils(self, error: Exception) -> bool:
        """Whether an error of one job leaves the whole transaction in doubt."""

    def explained(self, error: Exception) -> Exception:
        """The error in the program's own terms."""


@dataclasses.dataclass
class _Job:
    work: Callable[[Connection], Any]
    answer: Future[Any]


class GroupCommit(threading.Thread):
    """Owns a session. Jobs go in by `submit`, answers come back as futures after the commit."""

    def __init__(self, session: Session, name: str = "ledger") -> None:
        super().__init__(name=name, daemon=True)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._session = session
        self.start()

    def submit(self, work: Callable[[Connection], T]) -> Future[T]:
        answer: Future[T] = Future()
        self._jobs.put(_Job(work, answer))
        return answer

    def stop(self) -> None:
        """Finish what was submitted, then close the session. Idempotent."""
        self._jobs.put(None)
        self.join()

    def run(self) -> None:
        while batch := self._take():
            for job, outcome in zip(batch, self._outcomes(batch), strict=True):
                _answer(job, outcome)
        self._session.close()

    def _take(self) -> list[_Job]:
        """All that waits, at least one job; empty when it is time to stop."""
        batch: list[_Job] = []
        job = self._jobs.get()
        while job is not None:
            batch.append(job)
            if len(batch) == GROUP or self._jobs.empty():
                return batch
            job = self._jobs.get()
        if batch:
            self._jobs.put(None)
        return batch

    def _outcomes(self, batch: list[_Job]) -> list[Any]:
        """What each job gave or raised, once that is durable; one error for all where nothing could be."""
        give_up = time.monotonic() + TRY_FOR_S
        while True:
            try:
                self._session.begin()
                outcomes = [self._attempt(job.work) for job in batch]
                self._session.commit()
                return outcomes
            except Exception as error:
                self._session.rollback()
                if not isinstance(error, self._session.errors):  # a fault of ours: whoever asked must hear of it
                    return [error] * len(batch)
                pause_s = self._session.again(error)
                if pause_s is None or time.monotonic() + pause_s > give_up:
                    return [self._session.explained(error)] * len(batch)
            time.sleep(random.uniform(0.1, 1.0) * pause_s)  # jitter, not a secret

    def _attempt(self, work: Callable[[Connection], Any]) -> Any:
        """The job's result, or the exception that undid it and it alone."""
        session = self._session
        session.execute("SAVEPOINT job")
        try:
            result = work(session)
        except Exception as error:  # whatever it is, the caller that asked for this job gets it
            known = isinstance(error, session.errors)
            if known and session.spoils(error):
                raise
            session.execute("ROLLBACK TO job")
            result = session.explained(error) if known else error
        session.execute("RELEASE job")
        return result


def _answer(job: _Job, outcome: Any) -> None:
    with contextlib.suppress(InvalidStateError):  # the caller has gone: its future is cancelled
        if isinstance(outcome, BaseException):
            job.answer.set_exception(outcome)
        else:
            job.answer.set_result(outcome)
