"""Named steps of the stores: a process is told of each just before it is taken, and once more when it is done.

The seam is the stores' own: statements and commits go through a session, files through `os`, a bucket through its put. A
step is named after what it is about to do, `INSERT INTO contributions`, `COMMIT`, `file link`, `bucket put` or `combine`; what
only reads is no step. Whoever is told may kill or stop the process there, or raise what a full disk raises.
"""

from __future__ import annotations

import errno
import os
import re
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from coordinator import closing
from coordinator.stores import files, sqlite
from wire.errors import Reason, Refused

Told = Callable[[str, int], bool]
"""Of a step and which of its arrivals this is, from 1; True if the disk should be full there."""
FILE_CALLS = ("write", "link", "utime", "ftruncate")


class Steps:
    """Counts arrivals at each step, on whichever thread."""

    def __init__(self, told: Told) -> None:
        self.arrivals = Counter[str]()
        self._told, self._lock = told, threading.Lock()

    def before(self, step: str, full: Exception) -> None:
        """Raises `full` where the disk is."""
        if self._reach(step):
            raise full

    def after(self, step: str) -> None:
        self._reach(f"{step} done")

    def _reach(self, step: str) -> bool:
        with self._lock:
            self.arrivals[step] += 1
            arrival = self.arrivals[step]
        return self._told(step, arrival)


def instrument(steps: Steps) -> None:
    """Put the steps into this process's stores: those whose libraries are there."""
    vars(files)["os"] = _Os(steps)
    _statements(sqlite._Session, steps, lambda: sqlite3.OperationalError("database or disk is full"))
    _deletes(files.FileBlobs, steps)
    _combining(steps)
    try:
        from obstore.exceptions import GenericError
        from psycopg.errors import DiskFull

        from coordinator.stores import postgresql, s3
    except ImportError:
        return
    _statements(postgresql._Session, steps, lambda: DiskFull("no space left on device"))
    _puts(s3.S3Blobs, steps, lambda: GenericError("507 Insufficient Storage"))
    _deletes(s3.S3Blobs, steps)


class _Os:
    """`os` for the file store."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name == "fsync":
            return lambda handle: None  # what is in the page cache outlives kill -9: no sync is waited for
        if name not in FILE_CALLS:
            return real

        def stepped(*args: Any) -> Any:
            self._steps.before(f"file {name}", OSError(errno.ENOSPC, "no space left on device"))
            result = real(*args)
            self._steps.after(f"file {name}")
            return result

        return stepped


def _statements(session: Any, steps: Steps, full: Callable[[], Exception]) -> None:
    execute, commit, begin = session.execute, session.commit, session.begin
    changed = set[int]()

    def begun(self: Any) -> None:
        changed.discard(id(self))
        begin(self)

    def stepped(self: Any, sql: str, values: Any = (), /) -> Any:
        if sql.startswith(("INSERT", "UPDATE", "DELETE")):
            changed.add(id(self))
            steps.before(" ".join(re.split(r"[\s(]+", sql)[:3]), full())
        return execute(self, sql, values)

    def committed(self: Any) -> None:
        if id(self) not in changed:
            commit(self)
            return
        steps.before("COMMIT", full())
        commit(self)
        steps.after("COMMIT")

    session.execute, session.commit, session.begin = stepped, committed, begun


def _puts(blobs: Any, steps: Steps, full: Callable[[], Exception]) -> None:
    put = blobs._put

    def stepped(self: Any, name: str, data: Any, mode: Any = "create") -> None:
        steps.before("bucket put", full())
        put(self, name, data, mode)
        steps.after("bucket put")

    blobs._put = stepped


def _deletes(blobs: Any, steps: Steps) -> None:
    delete = blobs.delete

    def stepped(self: Any, digest: str) -> None:
        steps.before("blob delete", Refused(Reason.BUSY, "the blob store does not answer"))
        delete(self, digest)
        steps.after("blob delete")

    blobs.delete = stepped


def _combining(steps: Steps) -> None:
    combine = closing._combine

    def stepped(*given: Any) -> Any:
        steps.before("combine", Refused(Reason.DISK_FULL, "the coordinator's disk is full"))
        release = combine(*given)
        steps.after("combine")
        return release

    closing._combine = stepped  # type: ignore[assignment]
