"""Stores: where all of a coordinator's state lives. Two protocols, one table each, one conformance suite each.

The ledger is the only point of truth: every method is one transaction, durable when it returns. Blobs are immutable
and content-addressed, and durable *before* the ledger names them; a blob that no row names is garbage, never damage.
Any number of processes may use one store at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from coordinator.rounds import Round
from coordinator.stores.connection import Connection
from wire import spec
from wire.delta import Layout
from wire.errors import EdgetuneError, Reason, UserError
from wire.messages import Contribution, Control, Receipt, ReleaseManifest, RunStatus, Task
from wire.run_spec import EDITION, RunSpec

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as the ledger keeps it."""

    spec: RunSpec
    layout: Layout
    state: str


@dataclasses.dataclass(frozen=True)
class Ask:
    """A device that asks for work in `runs`, in this order; in any, if empty. Its program reads run specs up to `edition`."""

    device: str
    runs: tuple[str, ...]
    edition: int = EDITION


@dataclasses.dataclass(frozen=True)
class Offers:
    """The answer to a check-in: a task, or how many of the runs asked for are still going, and in how many seconds one
    of them has work at the latest (None where nobody knows)."""

    task: Task | None
    active: int
    ended: tuple[str, ...]
    work_in_s: float | None = None


class Ledger(Protocol):
    """Rounds and what belongs to them. Raises Refused by name, StoreError if the store is damaged.

    Where a row names blobs, `since_us` is `now_us` of before they were put or looked at: BUSY if a sweep has deleted one since.
    """

    async def create_run(
        self, spec: RunSpec, layout: Layout, release: ReleaseManifest, since_us: int | None = None
    ) -> None:
        """Open a run at round 1. The same run again is a no-op; another of the same name is RUN_EXISTS."""

    async def run(self, name: str) -> Run:
        """UNKNOWN_RUN if there is none."""

    async def status(self, name: str) -> RunStatus:
        """UNKNOWN_RUN if there is none."""

    async def control(self, name: str, action: Control, reason: str) -> None:
        """Pause, resume or stop a run, with a line of why. Idempotent. UNKNOWN_RUN; RUN_ENDED if it is over."""

    async def names(self) -> list[str]:
        """Every run, oldest first."""

    async def offer(self, device: str, runs: tuple[str, ...]) -> Offers:
        """A task of the first of `runs` (all, if empty) that has one for `device`. A device that asks again while its
        task is open gets the same task again. TOO_OLD for one that can read none of them."""

    async def offer_together(self, asks: Sequence[Ask]) -> list[Offers | EdgetuneError]:
        """As `offer` for each, in one transaction; where a round wants fewer than ask, it takes them by lot. What `offer`
        would raise for one stands in its place."""

    async def leave(self, device: str, run: str, number: int, attempt: int) -> None:
        """Give a task back. Idempotent: without an open task nothing happens."""

    async def check(self, contribution: Contribution) -> Receipt | None:
        """Would `accept` take it? Refuses as `accept` does; the receipt if it is already in; else None. Reads only."""

    async def accept(self, contribution: Contribution, since_us: int | None = None) -> Receipt:
        """Count a checked contribution. Idempotent: the same again gives the same receipt, whatever the round's state.
        NOT_ASSIGNED, ROUND_CLOSED, WRONG_BASE or CONFLICTING_UPDATE (another digest under the same key). Of a run in
        buffers it counts in the one that is open now: STALE_RELEASE if it started too far back, CONFLICTING_UPDATE if the
        device has given its update. What fills a buffer opens the next in the same transaction."""

    async def refuse(self, run: str, reason: Reason) -> None:
        """Count a refusal. A run that does not exist is not counted."""

    async def tick(self) -> list[tuple[str, Round]]:
        """Let overdue rounds seal or start again; returns them as they ended, by run name."""

    async def sealed(self) -> list[tuple[str, Round]]:
        """Rounds that wait to be combined, by run name: of a run's buffers the oldest."""

    async def rounds_by_state(self) -> dict[str, int]:
        """How many rounds of all runs are in each state."""

    async def contributions(self, run: str, number: int, attempt: int) -> list[Contribution]:
        """What counts in a round, sorted by device."""

    async def publish(self, run: str, sealed: Round, release: ReleaseManifest, since_us: int | None = None) -> bool:
        """Compare-and-swap: the sealed round becomes `release` and the next round opens, in one transaction. False if
        somebody else has published it, or its base is not the newest release: the caller forgets its own."""

    async def fail(self, run: str, sealed: Round, detail: str) -> bool:
        """Compare-and-swap: the sealed round is abandoned and the run, if it has not ended, fails with a line of why; a buffer
        that is open closes. False if somebody else has done so, or published."""

    async def release(self, run: str, version: int | None) -> ReleaseManifest:
        """One release, None for the newest. UNKNOWN_RELEASE if there is none."""

    async def attempt(self, run: str, version: int) -> int:
        """The attempt of round `version` that made a release. UNKNOWN_RELEASE if there is none."""

    async def named_blobs(self) -> set[str]:
        """Every blob that a contribution, a release or an upload names."""

    async def now_us(self) -> int:
        """The store's clock."""

    async def transact(self, work: Callable[[Connection, int], T]) -> T:
        """`work(connection, store clock in µs)` as one transaction, for the tables of `devices.py` and `uploads.py`. As every
        transaction it may be run again after its commit was cut off: `work` does the same twice as once."""

    async def look(self, work: Callable[[Connection, int], T]) -> T:
        """As `transact`, for work that reads only."""

    def others(self) -> AsyncIterator[bool]:
        """For ever: yields soon after another process has changed something, and now and then without cause. True if there
        may be new work for devices that wait: most changes are none, and there may be many who wait."""

    async def close(self) -> None:
        """Finish what is under way and release the store."""


class BlobWriter(Protocol):
    """One blob being written; nothing is visible before `commit`."""

    def write(self, data: bytes | memoryview) -> None: ...

    def commit(self) -> str:
        """Make the blob durable and visible; its digest. BAD_SIZE, BAD_DIGEST if it is not what was declared."""


class Growing(Protocol):
    """A blob that grows in place under a name that is no digest, held by one caller of one process at a time."""

    def size(self) -> int: ...

    def write(self, start: int, data: bytes | memoryview) -> None:
        """Put bytes at `start`, which is at most `size`, and end with them. DISK_FULL."""

    def sync(self) -> None:
        """Make what was written durable."""

    def finish(self, digest: str) -> None:
        """Name the bytes by their digest, which the caller has checked; durable when it returns."""


class Blobs(Protocol):
    """Immutable bytes under their SHA-256; where a store can, also bytes that grow, under a name of 32 digits."""

    def writer(self, digest: str | None, size: int) -> AbstractContextManager[BlobWriter]:
        """Write a blob of exactly `size` bytes; leaving without `commit` leaves nothing behind. DISK_FULL."""

    def put(self, data: bytes | memoryview) -> str:
        """Write at once. The same bytes again are a no-op."""

    def grow(self, name: str) -> None:
        """Begin a blob that grows, where the store has such. The same again is a no-op."""

    def growing(self, name: str) -> AbstractContextManager[Growing | None]:
        """A blob that grows, for this caller alone while the context is open; None if there is none. BUSY if another has it."""

    def get(self, digest: str) -> memoryview:
        """The bytes, mapped where the store can. UNKNOWN_BLOB if there are none."""

    def size(self, digest: str) -> int:
        """Bytes of a blob. UNKNOWN_BLOB if there is none."""

    def digests(self) -> Iterator[str]:
        """Every blob, in no order."""

    def older(self, than_s: float) -> Iterator[str]:
        """Every blob that nobody has put for `than_s` seconds; putting one again makes it new."""

    def delete(self, digest: str) -> None:
        """Forget a blob. Idempotent."""

    def free_bytes(self) -> int | None:
        """Room on the disk that blobs lie on, or pass through; None where there is no such bound."""


LEDGERS: Mapping[str, str] = {
    "sqlite": "coordinator.stores.sqlite:SqliteLedger",
    "postgresql": "coordinator.stores.postgresql:PostgresLedger",
}
BLOBS: Mapping[str, str] = {
    "files": "coordinator.stores.files:FileBlobs",
    "memory": "coordinator.stores.memory:MemoryBlobs",
    "s3": "coordinator.stores.s3:S3Blobs",
}


@dataclasses.dataclass(frozen=True)
class Store:
    """A ledger and its blobs."""

    ledger: Ledger
    blobs: Blobs


FOLDER_ROWS = ("sqlite", "files")
NO_URL = (*FOLDER_ROWS, "memory")


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a store is: its ledger in a folder or at postgresql://…, its blobs in a folder or at s3://…"""

    ledger: str
    blobs: str

    @classmethod
    def of(cls, ledger: str, blobs: str | None) -> Place:
        """As the command line says it: a folder keeps its blobs in itself unless told otherwise. Raises UserError."""
        _row_name(LEDGERS, ledger, "--store", FOLDER_ROWS[0])
        if blobs is None and "://" in ledger:
            raise UserError("--blobs is missing: s3://BUCKET/PREFIX, or a folder that every replica sees")
        kept = blobs if blobs is not None else str(Path(ledger) / "blobs")
        _row_name(BLOBS, kept, "--blobs", FOLDER_ROWS[1])
        return cls(ledger, kept)

    def __str__(self) -> str:
        return f"{without_secrets(self.ledger)}, blobs in {without_secrets(self.blobs)}"

    def open(self, create: bool = True) -> Store:
        """Made if absent, unless `create` is False. Raises UserError for what is not in the tables or not there,
        MachineError where no store can be."""
        ledger: Ledger = _row(LEDGERS, self.ledger, "--store", FOLDER_ROWS[0])(self.ledger, create=create)
        return Store(ledger, _row(BLOBS, self.blobs, "--blobs", FOLDER_ROWS[1])(self.blobs))


def _row(table: Mapping[str, str], place: str, option: str, folder_row: str) -> Any:
    return spec.row_class(table, _row_name(table, place, option, folder_row), option)


def _row_name(table: Mapping[str, str], place: str, option: str, folder_row: str) -> str:
    """The row that a folder or a URL's scheme names: of those in the table, and of those alone."""
    scheme, is_url, _ = place.partition("://")
    urls = sorted(set(table) - set(NO_URL))
    if is_url and scheme not in urls:
        raise UserError(
            f"{option} {scheme}://…: choose a folder, or a URL: {', '.join(f'{name}://…' for name in urls)}"
        )
    return scheme if is_url else folder_row


def without_secrets(place: str) -> str:
    """A folder as it is; a URL as people and logs may see it: without password and options, and without anything where
    it is not certain which part is the password.

    >>> without_secrets("postgresql://ann:secret@db/edgetune?sslmode=require")
    'postgresql://ann@db/edgetune'
    """
    scheme, is_url, rest = place.partition("://")
    if not is_url:
        return place
    where, _, options = rest.partition("?")
    if where.count("@") > 1 or "@" in options:
        return f"{scheme}://…"
    user, at, host = where.rpartition("@")
    return f"{scheme}://{user.partition(':')[0]}{at}{host}"
