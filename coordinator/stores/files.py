"""Blobs as files, `ab/abcdef…`: written aside, synced, linked into place, directory synced. Survives power cuts.

One that grows lies under its own name from the start, and is linked into its place when it is whole.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from coordinator.stores.declared import Declared
from wire.contract import RETRY_AFTER_S
from wire.durable import make_folder, sync_folder
from wire.errors import MachineError, Reason, Refused

ABANDONED_AFTER_S = 86_400.0
"""A file still being written after a day belongs to a process that died: no request lives that long."""


@contextlib.contextmanager
def _disk() -> Iterator[None]:
    """A full disk is a refusal by name; every other I/O error is this machine's."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise Refused(Reason.DISK_FULL, "the coordinator's disk is full") from error
        raise MachineError(f"blob store: {error}") from error


def _linked(path: Path, place: Path) -> bool:
    try:
        os.link(path, place)
    except FileExistsError:
        return False
    return True


def _lock(handle: int) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Refused(Reason.BUSY, "another call adds to this upload", RETRY_AFTER_S) from error
    except OSError as error:
        raise MachineError(f"blob store: files cannot be locked here: {error}") from error


class _FileWriter:
    def __init__(self, blobs: FileBlobs, handle: int, path: Path, declared: Declared) -> None:
        self._blobs, self._handle, self._path, self._declared = blobs, handle, path, declared

    def write(self, data: bytes | memoryview) -> None:
        self._declared.take(data)
        with _disk():
            view = memoryview(data)
            while view:
                view = view[os.write(self._handle, view) :]

    def commit(self) -> str:
        digest = self._declared.checked()
        with _disk():
            os.fsync(self._handle)
            self._blobs.link(self._path, digest)
        return digest


class _Growing:
    """See `coordinator.stores.Growing`."""

    def __init__(self, blobs: FileBlobs, handle: int, path: Path) -> None:
        self._blobs, self._handle, self._path = blobs, handle, path

    def size(self) -> int:
        return os.fstat(self._handle).st_size

    def write(self, start: int, data: bytes | memoryview) -> None:
        view = memoryview(data)
        with _disk():
            os.ftruncate(self._handle, start)  # beyond it may lie what a process that died left
            os.lseek(self._handle, start, os.SEEK_SET)
            while view:
                view = view[os.write(self._handle, view) :]

    def sync(self) -> None:
        with _disk():
            os.fsync(self._handle)

    def finish(self, digest: str) -> None:
        with _disk():
            self._blobs.link(self._path, digest)


class FileBlobs:
    """See `coordinator.stores.Blobs`."""

    def __init__(self, folder: str | Path) -> None:
        self._folder, self._aside = Path(folder), Path(folder) / "aside"
        self._durable: set[str] = set()
        try:
            make_folder(self._aside)
        except OSError as error:
            raise MachineError(f"{folder}: cannot keep blobs here: {error.strerror}") from error
        self._sweep()

    def _sweep(self) -> None:
        for path in self._aside.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process swept it first
                if time.time() - path.stat().st_mtime > ABANDONED_AFTER_S:
                    path.unlink()

    @contextlib.contextmanager
    def writer(self, digest: str | None, size: int) -> Iterator[_FileWriter]:
        with _disk():
            handle, name = tempfile.mkstemp(dir=self._aside)
        path = Path(name)
        try:
            yield _FileWriter(self, handle, path, Declared(digest, size))
        finally:
            os.close(handle)
            path.unlink(missing_ok=True)

    def link(self, path: Path, digest: str) -> None:
        """Give a finished file its name. The winner of a race and the loser have the same bytes."""
        place = self._place(digest)
        self._make_folder(place.parent)
        while not _linked(path, place):
            with contextlib.suppress(FileNotFoundError):  # `gc` was faster: link it again
                os.utime(place)  # as good as new: `gc` goes by age
                break
        sync_folder(place.parent)

    def _make_folder(self, folder: Path) -> None:
        """A folder for blobs, with a durable name. That it is there says nothing of its name: who made it may have died."""
        if folder.name not in self._durable:
            folder.mkdir(mode=0o700, exist_ok=True)
            sync_folder(self._folder)
            self._durable.add(folder.name)

    def grow(self, name: str) -> None:
        place = self._place(name)
        with _disk():
            self._make_folder(place.parent)
            os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o600))
            sync_folder(place.parent)

    @contextlib.contextmanager
    def growing(self, name: str) -> Iterator[_Growing | None]:
        """The lock is the open file's: it ends with the process, however that ends."""
        place = self._place(name)
        try:
            handle = os.open(place, os.O_RDWR)
        except FileNotFoundError:
            yield None
            return
        try:
            _lock(handle)
            yield _Growing(self, handle, place)
        finally:
            os.close(handle)

    def put(self, data: bytes | memoryview) -> str:
        with self.writer(None, len(data)) as writer:
            writer.write(data)
            return writer.commit()

    def get(self, digest: str) -> memoryview:
        try:
            with self._place(digest).open("rb") as file:
                if os.fstat(file.fileno()).st_size == 0:  # an empty file cannot be mapped
                    return memoryview(b"")
                return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError as error:
            raise Refused(Reason.UNKNOWN_BLOB, f"no blob {digest[:12]}…") from error

    def size(self, digest: str) -> int:
        try:
            return self._place(digest).stat().st_size
        except FileNotFoundError as error:
            raise Refused(Reason.UNKNOWN_BLOB, f"no blob {digest[:12]}…") from error

    def digests(self) -> Iterator[str]:
        return (p.name for p in self._folder.glob("??/*"))

    def older(self, than_s: float) -> Iterator[str]:
        for path in self._folder.glob("??/*"):
            with contextlib.suppress(FileNotFoundError):  # another process deleted it first
                if time.time() - path.stat().st_mtime > than_s:
                    yield path.name

    def delete(self, digest: str) -> None:
        with _disk():
            self._place(digest).unlink(missing_ok=True)

    def free_bytes(self) -> int:
        return shutil.disk_usage(self._folder).free

    def _place(self, digest: str) -> Path:
        return self._folder / digest[:2] / digest
