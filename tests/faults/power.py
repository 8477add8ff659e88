"""Power cuts: a federation is recorded write by write and sync by sync, and what each of many moments would have left on the
disk is given to the coordinator to go on from.

    python -m tests.faults.power --cuts 500               many moments, of several recordings
    python -m tests.faults.power --cuts 60 --mistake NAME  the same, with a seeded bug

The ledger is recorded by an SQLite VFS (apsw's), the blobs and a device's state at the `os` of their modules.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import sqlite3
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apsw

from coordinator.service import Federation
from coordinator.stores import Place, files, sqlite
from edge_client import state
from protos.v1 import federation_pb2 as pb
from tests.faults import crashes, invariants
from tests.faults.disks import FOLDER, Disk, Sync, SyncFolder, Truncate, Write
from tests.faults.world import Replacement, replaced
from wire import durable, spec
from wire.errors import EdgetuneError
from wire.messages import Contribution, Receipt

CUTS_A_RECORDING = 10
DIRECTORY_SYNCED = apsw.SQLITE_OPEN_MAIN_JOURNAL | apsw.SQLITE_OPEN_WAL
"""Files whose first sync is one of their folder, too."""


class _File(apsw.VFSFile):
    def __init__(self, disk: Disk, name: Any, flags: list[int]) -> None:
        self._disk, self._path = disk, Path(name.filename() if isinstance(name, apsw.URIFilename) else name)
        self._new = self._path not in disk.names
        self._file = disk.new_file(self._path) if self._new else disk.names[self._path]
        self._with_folder = bool(flags[0] & DIRECTORY_SYNCED)
        super().__init__("unix", name, flags)

    def xWrite(self, data: Any, offset: int) -> None:
        self._disk.events.append(Write(self._file, offset, bytes(data)))
        super().xWrite(data, offset)

    def xTruncate(self, newsize: int) -> None:
        self._disk.events.append(Truncate(self._file, newsize))
        super().xTruncate(newsize)

    def xSync(self, flags: int) -> None:
        super().xSync(flags)
        self._disk.events.append(Sync(self._file))
        if self._new and self._with_folder:
            self._disk.events.append(SyncFolder(self._path.parent))
            self._new = False


class _Vfs(apsw.VFS):
    def __init__(self, disk: Disk) -> None:
        self._disk, self.called = disk, f"disk{id(disk)}"
        super().__init__(self.called, "unix")

    def xOpen(self, name: Any, flags: list[int]) -> Any:
        return _File(self._disk, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:
        super().xDelete(filename, syncdir)
        self._disk.leave(Path(filename))
        if syncdir:
            self._disk.events.append(SyncFolder(Path(filename).parent))


class _Rows:
    def __init__(self, rows: list[Any], rowcount: int) -> None:
        self._rows, self.rowcount = iter(rows), rowcount

    def fetchone(self) -> Any:
        return next(self._rows, None)

    def fetchall(self) -> list[Any]:
        return list(self._rows)


class _Connection:
    """As much of `sqlite3.Connection` as a session uses, over the recording VFS."""

    def __init__(self, db: apsw.Connection) -> None:
        self._db = db

    def execute(self, sql: str, values: Any = ()) -> _Rows:
        try:
            rows = list(self._db.execute(sql, tuple(values)))
        except apsw.Error as error:
            raise sqlite3.OperationalError(str(error)) from error
        return _Rows(rows, self._db.changes())

    def close(self) -> None:
        self._db.close()


class _Sqlite:
    """`sqlite3` for the ledger's module. A checkpoint comes every few pages: moments of it are what is worth a cut."""

    Error, OperationalError, Cursor = sqlite3.Error, sqlite3.OperationalError, sqlite3.Cursor

    def __init__(self, disk: Disk, checkpoint_pages: int) -> None:
        self._vfs, self._pages = _Vfs(disk), checkpoint_pages

    def connect(self, path: Path, **_: Any) -> _Connection:
        db = apsw.Connection(str(path), vfs=self._vfs.called)
        db.set_busy_timeout(10_000)
        db.wal_autocheckpoint(self._pages)
        return _Connection(db)


class _Os:
    """`os` and `tempfile` for modules that write files."""

    def __init__(self, disk: Disk) -> None:
        self._disk, self._handles = disk, dict[int, int]()
        self._ends = dict[int, int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def mkstemp(self, dir: Path) -> tuple[int, str]:
        handle, name = tempfile.mkstemp(dir=dir)
        self.opened(handle, Path(name))
        return handle, name

    def opened(self, handle: int, path: Path) -> None:
        self._handles[handle], self._ends[handle] = self._disk.new_file(path), 0

    def open(self, path: Path, flags: int, mode: int = 0o777) -> int:
        handle, known = os.open(path, flags, mode), self._disk.names.get(Path(path))
        if known is None and flags & os.O_CREAT:
            self.opened(handle, Path(path))
        elif known is not None:
            self._handles[handle], self._ends[handle] = known, 0
        return handle

    def close(self, handle: int) -> None:
        os.close(handle)
        self._handles.pop(handle, None)

    def ftruncate(self, handle: int, size: int) -> None:
        os.ftruncate(handle, size)
        self._disk.events.append(Truncate(self._handles[handle], size))

    def lseek(self, handle: int, at: int, whence: int) -> int:
        self._ends[handle] = os.lseek(handle, at, whence)
        return self._ends[handle]

    def write(self, handle: int, data: Any) -> int:
        size = os.write(handle, data)
        self._disk.events.append(Write(self._handles[handle], self._ends[handle], bytes(data[:size])))
        self._ends[handle] += size
        return size

    def fsync(self, handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.is_dir():
            self._disk.events.append(SyncFolder(path))
        else:
            file = self._handles.get(handle) or self._disk.whole(path)
            self._disk.events.append(Sync(file))

    def link(self, old: Path, new: Path) -> None:
        os.link(old, new)
        self._disk.enter(Path(new), self._disk.names[Path(old)])


def recorded_path(disk: Disk) -> type[Path]:
    """`Path` for modules that make and remove files by it."""

    class Recorded(type(Path())):  # type: ignore[misc]  # the class of this system's paths
        def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:
            there = self.exists()
            super().mkdir(mode, parents, exist_ok)
            if not there:
                disk.enter(Path(self), FOLDER)

        def unlink(self, missing_ok: bool = False) -> None:
            super().unlink(missing_ok)
            disk.leave(Path(self))

        def replace(self, target: Path) -> Path:
            if Path(self) not in disk.names:
                disk.whole(Path(self))
            moved = super().replace(target)
            disk.rename(Path(self), Path(target))
            return Path(moved)

    return Recorded


def seams(disk: Disk, checkpoint_pages: int = 20) -> list[Replacement]:
    """This process's store writes to `disk`."""
    system, path = _Os(disk), recorded_path(disk)
    return [
        (sqlite, "sqlite3", _Sqlite(disk, checkpoint_pages)),
        (sqlite, "Path", path),
        (files, "os", system),
        (files, "tempfile", system),
        (files, "Path", path),
        (durable, "os", system),
        (state, "os", system),
    ]


def normal_sync() -> list[Replacement]:
    """The ledger's log is synced now and then, and not with each commit."""
    execute = _Connection.execute

    def normal(self: Any, sql: str, values: Any = ()) -> Any:
        return execute(self, sql.replace("synchronous = FULL", "synchronous = NORMAL"), values)

    return [(_Connection, "execute", normal)]


def directory_not_synced() -> list[Replacement]:
    """A blob's name is given to it, and that is that."""
    return [(files, "sync_folder", lambda folder: None)]


def blob_not_synced() -> list[Replacement]:
    """A blob gets its name before its bytes are on the disk."""
    fsync = _Os.fsync

    def only_folders(self: Any, handle: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{handle}")).is_dir():
            fsync(self, handle)

    return [(_Os, "fsync", only_folders)]


async def in_parts(self: Federation, contribution: Contribution, payload: bytes | None) -> Receipt:
    """As `Federation._receive`, for a payload that comes in three parts."""
    if payload:
        upload = await self._core.uploads.create(contribution)
        third = -(-len(payload) // 3)
        for offset in range(upload.received, len(payload), third):
            data = payload[offset : offset + third]
            await self._core.uploads.append(
                pb.UploadPart(
                    upload=upload.id,
                    device=contribution.device,
                    offset=offset,
                    digest=spec.bytes_digest(data),
                    data=data,
                )
            )
    return await _receive(self, contribution, None if payload else payload)


_receive = Federation._receive
MISTAKES: dict[str, Callable[[], list[Replacement]]] = {
    mistake.__name__: mistake for mistake in (normal_sync, directory_not_synced, blob_not_synced)
}


class Recording:
    """A federation from its start to its end, and what its devices held when."""

    def __init__(self, folder: Path, mistake: str | None, chance: random.Random) -> None:
        self.disk = Disk(folder)
        self._receipts: list[tuple[int, Receipt]] = []
        heard = [(invariants, "note", lambda _, receipt: self._receipts.append((len(self.disk.events), receipt)))]
        wrong = MISTAKES[mistake]() if mistake else []
        parts = [(Federation, "_receive", in_parts)] if chance.random() < 0.5 else []
        with replaced(seams(self.disk, chance.choice([2, 20, 1000])) + heard + parts + wrong):
            asyncio.run(crashes.federation(place_in(folder), folder / "journal"))

    def cut(self, chance: random.Random, into: Path) -> list[str]:
        """Cut the power at some moment, start again, go on to the end: all that is wrong."""
        moment = chance.randint(1, len(self.disk.events))
        into.mkdir(parents=True)
        self.disk.left(moment, chance, into)
        journal = into / "journal"
        for told, receipt in self._receipts:
            if told <= moment:
                invariants.note(journal, receipt)
        return [f"{fault} (power cut after {moment} of {len(self.disk.events)})" for fault in _going_on(into, journal)]


def place_in(folder: Path) -> Place:
    return Place.of(str(folder / "store"), None)


def _going_on(folder: Path, journal: Path) -> list[str]:
    try:
        found = asyncio.run(_after_the_cut(place_in(folder), journal))
        asyncio.run(crashes.federation(place_in(folder), journal))
        return found + asyncio.run(invariants.violations_at(place_in(folder), [journal], ended=True))
    except (EdgetuneError, sqlite3.Error) as error:
        return [f"a coordinator cannot go on: {error}"]


async def _after_the_cut(place: Place, journal: Path) -> list[str]:
    """A store whose devices hold nothing need not be there yet."""
    if not journal.exists():
        return []
    return await invariants.violations_at(place, [journal], ended=False)


def cuts(count: int, mistake: str | None = None, first: int = 0) -> Iterator[list[str]]:
    """What is wrong after each of so many power cuts."""
    folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
    try:
        for number in range(first, first + count):
            chance = random.Random(f"{number}/power")
            if number == first or number % CUTS_A_RECORDING == 0:
                (folder / f"recording{number}").mkdir()
                recording = Recording(folder / f"recording{number}", mistake, chance)
            yield recording.cut(chance, folder / "cut")
            shutil.rmtree(folder / "cut")
    finally:
        shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.power")
    parser.add_argument("--cuts", type=int, default=500, help="how many (default: %(default)s)")
    parser.add_argument("--mistake", choices=sorted(MISTAKES), help="with a seeded bug")
    args = parser.parse_args()
    began, failed = time.monotonic(), 0
    for number, found in enumerate(cuts(args.cuts, args.mistake)):
        if found:
            failed += 1
            print(f"cut {number}:", *found[:5], sep="\n  ", flush=True)
    print(f"{args.cuts} power cuts in {time.monotonic() - began:.0f} s: {failed} with a fault")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
