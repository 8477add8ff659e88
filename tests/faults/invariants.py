"""What must hold of a store, whatever was done to its coordinators: one offline checker, for every kind of fault.

`violations` reads the rows and the blobs as they lie, beside the receipts that clients wrote down outside the store. It
checks, of every run:

1. releases have no gap, each names its parent, and each was made by the one published attempt of its round;
2. each release, computed again from its stored updates, has the same bytes;
3. every blob that a row names is there and has its digest; the parts of an upload lie end to end;
4. every receipt is an update in its attempt; an update counts once in the release of its attempt if that was published,
   and nowhere else;
5. nothing was accepted into a round that was no longer open: a round has as many updates as it says, never more than its
   goal, and fewer only from its minimum on and after its deadline; what was refused as too late is not in it;
6. seats: an open round has offered as many parts as there are devices that hold one (there is no privacy budget to check);
7. if it should have `ended`, every run has, and no round waits.

The eighth, memory that does not grow with the number of devices, cannot be seen in a store: who drives processes looks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from coordinator.rounds import Round
from coordinator.stores import Place, Store
from coordinator.stores.connection import Connection
from coordinator.stores.uploads import GROWN
from coordinator.uploads import HEADING_BYTES
from coordinator.verify import verify
from wire import spec
from wire.errors import EdgetuneError, Reason, StoreError
from wire.messages import ENDED, Contribution, Receipt, ReleaseManifest, Share

ROUND_COLUMNS = [field.name for field in dataclasses.fields(Round)]


def note(journal: Path, receipt: Receipt, refused: Reason | None = None) -> None:
    """What a client does with a receipt, or with a last word of no: one line, in one write, that outlives its process."""
    line = dataclasses.asdict(receipt) | ({"refused": refused.value} if refused else {})
    handle = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    try:
        os.write(handle, json.dumps(line).encode() + b"\n")
    finally:
        os.close(handle)


def receipts(journals: Iterable[Path]) -> list[Receipt]:
    """All that was noted; a journal that is not there is empty."""
    return [_receipt(line) for line in _lines(journals) if "refused" not in line]


def refusals(journals: Iterable[Path]) -> list[tuple[Receipt, Reason]]:
    """Each update, named as its receipt would name it, that a client was told will not count."""
    return [(_receipt(line), Reason[line.pop("refused")]) for line in _lines(journals) if "refused" in line]


def _lines(journals: Iterable[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for path in journals if path.exists() for line in path.read_text().splitlines()]


def _receipt(line: dict[str, Any]) -> Receipt:
    return Receipt(**{field.name: line[field.name] for field in dataclasses.fields(Receipt)})


async def violations_at(place: Place, journals: Iterable[Path], *, ended: bool, one_clock: bool = True) -> list[str]:
    """As `violations`, of a store that is opened for this and closed again."""
    store = place.open(create=False)
    try:
        found = list(journals)
        return await violations(store, receipts(found), refusals(found), ended=ended, one_clock=one_clock)
    finally:
        await store.ledger.close()


async def violations(
    store: Store,
    noted: Collection[Receipt],
    refused: Collection[tuple[Receipt, Reason]] = (),
    *,
    ended: bool,
    one_clock: bool = True,
) -> list[str]:
    """A sentence for each thing that is wrong; nothing, if all holds. Without `one_clock` processes of other clocks wrote
    times into this store, and those are not compared."""
    names = await store.ledger.names()
    found = [f"a receipt of a run that is gone: {lost}" for lost in {receipt.run for receipt in noted} - set(names)]
    found += ["there is no run"] if ended and not names else []
    found += [*await _of_engine(store), *await _of_blobs(store), *await _of_uploads(store)]
    for name in names:
        seen = await _Seen.of(store, name)
        found += _of_rounds(seen) + _of_releases(seen) + _of_updates(seen) + _of_seats(seen)
        own = {receipt for receipt in noted if receipt.run == name}
        found += _of_receipts(seen, own)
        found += _of_times(seen) + _of_refusals(seen, refused, own) if one_clock else []
        found += await _of_bytes(store, name)
        found += _of_the_end(seen) if ended else []
    return found


@dataclasses.dataclass(frozen=True)
class _Seen:
    """One run, read as it lies. `updates` by round and attempt; times are of the store's clock, in µs."""

    name: str
    state: str
    rounds: list[Round]
    releases: list[ReleaseManifest]
    shares: dict[int, tuple[Share, ...]]
    """Of each release that has them in a blob of their own."""
    made_by: dict[int, tuple[int, int]]
    """By version: the attempt, and when it was published."""
    updates: dict[tuple[int, int], list[Contribution]]
    accepted_us: dict[tuple[int, int, str], int]
    holders: Counter[tuple[int, int]]
    """How many devices hold a part, by round and attempt."""

    @classmethod
    async def of(cls, store: Store, name: str) -> _Seen:
        found = [Round(*row) for row in await _rows(store, _SELECT_ROUNDS, name)]
        made_by = {version: (attempt, us) for version, attempt, us in await _rows(store, _SELECT_RELEASES, name)}
        rows = await _rows(store, _SELECT_CONTRIBUTIONS, name)
        held = await _rows(store, _SELECT_HELD, name)
        releases = [await store.ledger.release(name, version) for version in sorted(made_by)]
        return cls(
            name=name,
            state=(await store.ledger.run(name)).state,
            rounds=found,
            releases=releases,
            shares={release.version: _shares(store, release) for release in releases if release.shares},
            made_by=made_by,
            updates={(r.number, r.attempt): await store.ledger.contributions(name, r.number, r.attempt) for r in found},
            accepted_us={(number, attempt, device): us for number, attempt, device, us in rows},
            holders=Counter({(number, attempt): count for number, attempt, count in held}),
        )

    def attempts(self) -> Iterator[list[Round]]:
        """The attempts at each round, in order."""
        for _, group in itertools.groupby(self.rounds, key=lambda one: one.number):
            yield list(group)

    def counting(self) -> list[Round]:
        """Rounds whose updates are their own: every attempt, but of a buffer, whose attempts hand them on, the last."""
        last = {one.number: one for one in self.rounds}
        return [one for one in self.rounds if one.max_staleness is None or last[one.number] is one]

    def times(self, one: Round) -> list[int]:
        """When its updates were accepted."""
        updates = self.updates[one.number, one.attempt]
        return [self.accepted_us[update.round, update.attempt, update.device] for update in updates]


_SELECT_ROUNDS = f"SELECT {', '.join(ROUND_COLUMNS)} FROM rounds WHERE run = ? ORDER BY number, attempt"  # constants
_SELECT_RELEASES = "SELECT version, attempt, published_us FROM releases WHERE run = ?"
_SELECT_CONTRIBUTIONS = "SELECT number, attempt, device, accepted_us FROM contributions WHERE run = ?"
_SELECT_HELD = "SELECT number, attempt, COUNT(*) FROM assignments WHERE run = ? AND state <> 'left' GROUP BY 1, 2"


async def _rows(store: Store, query: str, *values: Any) -> list[Any]:
    work: Callable[[Connection, int], list[Any]] = lambda db, _: db.execute(query, values).fetchall()  # noqa: E731
    return await store.ledger.look(work)


async def _of_engine(store: Store) -> list[str]:
    """SQLite can say whether its file is sound; PostgreSQL's is its own affair."""
    try:
        said = [row[0] for row in await _rows(store, "PRAGMA integrity_check")]
    except StoreError as error:
        return [] if "syntax" in str(error) else [str(error)]
    return [f"the ledger's file: {line}" for line in said if line != "ok"]


async def _of_blobs(store: Store) -> list[str]:
    return [fault for digest in await store.ledger.named_blobs() if (fault := _damage(store, digest))]


def _damage(store: Store, digest: str) -> str | None:
    try:
        whole = spec.bytes_digest(store.blobs.get(digest)) == digest
    except EdgetuneError:
        return f"a row names blob {digest[:12]}… and it is not there"
    return None if whole else f"a row names blob {digest[:12]}… and it has other bytes"


async def _of_uploads(store: Store) -> list[str]:
    found = []
    for upload, size, received in await _rows(store, "SELECT id, size, received FROM uploads"):
        query = "SELECT start, digest FROM upload_parts WHERE upload = ? ORDER BY start"
        end = 0
        for start, digest in await _rows(store, query, upload):
            found += [f"upload {upload[:8]}… has a part at {start}, not at {end}"] if start != end else []
            grown = digest == GROWN  # beyond its end may lie what no row speaks of
            end = min(store.blobs.size(upload), received) if grown else start + store.blobs.size(digest) - HEADING_BYTES
        if end != received or received > size:
            found.append(f"upload {upload[:8]}… says {received} of {size} bytes and has {end}")
    return found


async def _of_bytes(store: Store, name: str) -> list[str]:
    try:
        return [f"release {one.version}: {one.fault}" for one in await verify(store, name) if one.fault]
    except EdgetuneError as error:
        return [f"the releases cannot be computed again: {error}"]


def _shares(store: Store, release: ReleaseManifest) -> tuple[Share, ...]:
    """None where the blob is not there or damaged, which `_of_blobs` says too."""
    with contextlib.suppress(EdgetuneError, ValueError):
        return tuple(Share(**row) for row in json.loads(bytes(store.blobs.get(release.shares or ""))))
    return ()


def _of_rounds(seen: _Seen) -> list[str]:
    """Rounds and attempts follow each other without a gap, and only the last of each may be more than abandoned."""
    found = []
    for number, attempts in enumerate(seen.attempts(), start=1):
        if [(one.number, one.attempt) for one in attempts] != [(number, n + 1) for n in range(len(attempts))]:
            found.append(f"rounds and attempts have a gap at {number}")
        if any(one.state != "abandoned" for one in attempts[:-1]):
            found.append(f"round {number} has an attempt after one that was not abandoned")
    return found


def _of_releases(seen: _Seen) -> list[str]:
    published = {r.number: r.attempt for r in seen.rounds if r.state == "published" and r.kind == "train"}
    found = []
    if {version: made[0] for version, made in seen.made_by.items() if version} != published:
        found.append("the releases are not those of the published attempts")
    if not sorted(seen.made_by) == [release.version for release in seen.releases] == list(range(len(seen.releases))):
        found.append("the releases have a gap")
    for parent, release in itertools.pairwise(seen.releases):
        if release.parent != parent.digest:
            found.append(f"release {release.version} names another parent")
        made_of = [(share.device, share.digest) for share in seen.shares.get(release.version, release.contributions)]
        accepted = seen.updates.get((release.version, published.get(release.version, 0)), [])
        if made_of != [(update.device, update.digest) for update in accepted]:
            found.append(f"release {release.version} is not made of what its round accepted")
    return found


def _of_updates(seen: _Seen) -> list[str]:
    """What a round accepted, beside what it says and what its rules are."""
    found = []
    for one in seen.counting():
        updates, where = seen.updates[one.number, one.attempt], f"round {one.number} (attempt {one.attempt})"
        if len(updates) != one.accepted:
            found.append(f"{where} says {one.accepted} updates and has {len(updates)}")
        if len({update.device for update in updates}) != len(updates):
            found.append(f"{where} counts a device twice")
        if one.accepted > one.goal or (one.state in ("sealed", "published") and one.accepted < one.minimum):
            found.append(f"{where} closed with {one.accepted} updates, for a goal of {one.goal}")
    return found


def _of_times(seen: _Seen) -> list[str]:
    """The store has one clock, by which everything happens in order."""
    found = [
        f"round {one.number} (attempt {one.attempt}) broke the rule of its deadline"
        for one in seen.counting()
        if not _in_time(seen, one)
    ]
    published = [us for _, (_, us) in sorted(seen.made_by.items())]
    if published != sorted(published):
        found.append("a release is older than the one before")
    for one in seen.counting():
        opened_us = seen.made_by.get(one.base_version, (0, 0))[1]
        if one.max_staleness is None and any(time < opened_us for time in seen.times(one)):
            found.append(f"round {one.number} has an update from before it opened")
    return found


def _in_time(seen: _Seen, last: Round) -> bool:
    """Nothing came after the deadline, nor after the release; and a round that is not full waited for its deadline."""
    _, published_us = seen.made_by.get(last.number, (0, None))
    times = seen.times(last)
    if last.max_staleness is not None or last.paused_us is not None or last.deadline_us is None:
        return True
    closed_us = published_us if last.state == "published" and last.kind == "train" else None
    if closed_us is not None and any(time > closed_us for time in times):
        return False
    if closed_us is not None and last.accepted < last.goal and closed_us < last.deadline_us:
        return False
    return all(time < last.deadline_us for time in times)


def _of_seats(seen: _Seen) -> list[str]:
    """Of rounds: who holds a part of a buffer may have had it from an earlier one."""
    return [
        f"round {one.number} says {one.offered} parts are held, and it is {seen.holders[one.number, one.attempt]}"
        for one in seen.rounds
        if one.state == "open" and one.max_staleness is None and one.offered != seen.holders[one.number, one.attempt]
    ]


def _of_receipts(seen: _Seen, noted: set[Receipt]) -> list[str]:
    """Each is an update of its attempt. Whether that counts as often as it should, the releases say."""
    rows = [update for updates in seen.updates.values() for update in updates]
    kept = {Receipt(seen.name, u.round, u.attempt, u.device, u.digest) for u in rows}
    found = [f"a receipt without an update: {lost}" for lost in sorted(noted - kept, key=repr)]
    given = Counter((r.round, r.attempt, r.device) for r in noted)
    return found + [f"two receipts for one task: {task}" for task, count in given.items() if count > 1]


def _of_refusals(seen: _Seen, refused: Collection[tuple[Receipt, Reason]], noted: set[Receipt]) -> list[str]:
    """What a device was told is lost to its round is not in it: but for a task that it got once more, and a receipt. What an
    attempt had that was then abandoned is in no round, whether its device still heard of a receipt or no longer."""
    gone = {(one.number, one.attempt) for one in seen.rounds if one.state == "abandoned" and one.max_staleness is None}
    rows = (u for one in seen.updates.values() for u in one if (u.round, u.attempt) not in gone)
    kept = {Receipt(seen.name, u.round, u.attempt, u.device, u.digest) for u in rows}
    told = {update for update, reason in refused if reason in (Reason.ROUND_CLOSED, Reason.NOT_ASSIGNED)} - noted
    return [f"an update counts whose device was told that it does not: {one}" for one in sorted(told & kept, key=repr)]


def _of_the_end(seen: _Seen) -> list[str]:
    found = [] if seen.state in ENDED else [f"{seen.name} does not end: it is {seen.state}"]
    waiting = [one for one in seen.rounds if one.state in ("open", "sealed")]
    return found + [f"round {one.number} of {seen.name} still waits: it is {one.state}" for one in waiting]
