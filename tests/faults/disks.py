"""A disk that may lose power: what was done to its files, in order, and what of it is left.

What POSIX promises and no more. Bytes of a file are kept once it was synced, a name in a folder once that folder was; until
then each write is there as a whole, in some of its sectors, or not at all, and each name is there or not.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterable
from pathlib import Path

SECTOR = 512


@dataclasses.dataclass(frozen=True)
class Write:
    file: int
    at: int
    data: bytes


@dataclasses.dataclass(frozen=True)
class Truncate:
    file: int
    size: int


@dataclasses.dataclass(frozen=True)
class Sync:
    file: int


@dataclasses.dataclass(frozen=True)
class Name:
    """A folder's entry from now on: a file, a folder (0), or nothing (None)."""

    path: Path
    what: int | None


@dataclasses.dataclass(frozen=True)
class Rename:
    old: Path
    new: Path
    file: int


@dataclasses.dataclass(frozen=True)
class SyncFolder:
    path: Path


Change = Write | Truncate
Event = Change | Sync | Name | Rename | SyncFolder
FOLDER = 0


class Disk:
    """Records; `root` itself outlives everything."""

    def __init__(self, root: Path) -> None:
        self.root, self.events = root, list[Event]()
        self.names: dict[Path, int] = {}
        """What each path is now."""
        self._files = FOLDER

    def new_file(self, path: Path) -> int:
        self._files += 1
        self.enter(path, self._files)
        return self._files

    def whole(self, path: Path) -> int:
        """A file that was written by means that nobody watched."""
        file = self.names.get(path) or self.new_file(path)
        self.events += [Truncate(file, 0), Write(file, 0, path.read_bytes())]
        return file

    def enter(self, path: Path, what: int) -> None:
        self.names[path] = what
        self.events.append(Name(path, what))

    def leave(self, path: Path) -> None:
        if self.names.pop(path, None) is not None:
            self.events.append(Name(path, None))

    def rename(self, old: Path, new: Path) -> None:
        self.names[new] = self.names.pop(old)
        self.events.append(Rename(old, new, self.names[new]))

    def left(self, moment: int, chance: random.Random, into: Path) -> None:
        """What a power cut after the first `moment` events leaves, as files below `into`."""
        kept, pending, names, unsure = _played(self.events[:moment])
        for event in unsure:
            if chance.random() < 0.5:
                _apply(names, event)
        for path in sorted(names):
            what, place = names[path], into / path.relative_to(self.root)
            if not place.parent.is_dir():
                continue  # the folder that it is in was lost
            if what == FOLDER:
                place.mkdir()
            else:
                place.write_bytes(_torn(kept.get(what, b""), pending.get(what, []), chance))


def _played(
    events: Iterable[Event],
) -> tuple[dict[int, bytes], dict[int, list[Change]], dict[Path, int], list[Name | Rename]]:
    """Bytes that are kept and changes that are not yet, by file; names that are kept, and what may become of them."""
    kept: dict[int, bytes] = {}
    pending: dict[int, list[Change]] = {}
    names: dict[Path, int] = {}
    unsure: list[Name | Rename] = []
    for event in events:
        match event:
            case Write() | Truncate():
                pending.setdefault(event.file, []).append(event)
            case Sync(file):
                kept[file] = _changed(kept.get(file, b""), pending.pop(file, []))
            case SyncFolder(path):
                for change in [one for one in unsure if path in _folders(one)]:
                    _apply(names, change)
                    unsure.remove(change)
            case _:
                unsure.append(event)
    return kept, pending, names, unsure


def _folders(event: Name | Rename) -> set[Path]:
    return {event.path.parent} if isinstance(event, Name) else {event.new.parent}


def _apply(names: dict[Path, int], event: Name | Rename) -> None:
    if isinstance(event, Rename):
        names.pop(event.old, None)
        names[event.new] = event.file
    elif event.what is None:
        names.pop(event.path, None)
    else:
        names[event.path] = event.what


def _changed(data: bytes, changes: Iterable[Change]) -> bytes:
    made = bytearray(data)
    for change in changes:
        if isinstance(change, Truncate):
            del made[change.size :]
        else:
            made.extend(bytes(max(0, change.at + len(change.data) - len(made))))
            made[change.at : change.at + len(change.data)] = change.data
    return bytes(made)


def _torn(data: bytes, changes: list[Change], chance: random.Random) -> bytes:
    """Some of the changes, some of them in part."""
    pieces = [piece for change in changes for piece in _sectors(change)]
    share = chance.choice([0.0, 0.5, 1.0])
    return _changed(data, [piece for piece in pieces if chance.random() < share])


def _sectors(change: Change) -> list[Change]:
    if isinstance(change, Truncate):
        return [change]
    starts = range(0, len(change.data), SECTOR)
    return [Write(change.file, change.at + start, change.data[start : start + SECTOR]) for start in starts]
