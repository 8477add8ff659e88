"""Blobs as files, `ab/abcdef…`: written aside, synced, linked into place, directory synced. Survives power cuts."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from coordinator.stores.declared import Declared
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
        self._ready(place.parent)
        while not _linked(path, place):
            with contextlib.suppress(FileNotFoundError):  # `gc` was faster: link it again
                os.utime(place)  # as good as new: `gc` goes by age
                break
        sync_folder(place.parent)

    def _ready(self, folder: Path) -> None:
        """A folder for blobs, with a durable name. That it is there says nothing of its name: who made it may have died."""
        if folder.name not in self._durable:
            folder.mkdir(exist_ok=True)
            sync_folder(self._folder)
            self._durable.add(folder.name)

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
