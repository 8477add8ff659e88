"""Large updates on their way in: parts that become durable one by one, then the whole that they make.

Where blobs can grow, parts are written to one, which becomes the update when it is whole. Elsewhere a part is a blob headed by
its upload and offset, so that no two uploads share one and it may be deleted with its row. The ledger alone says how far an
upload is: a replica that takes a part needs nothing of the one that took the part before.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import re
import secrets
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Iterable
from concurrent.futures import Executor
from typing import Any, TypeVar

from coordinator import ingest
from coordinator.guards import Arriving, Guards, turn
from coordinator.rules import Rules
from coordinator.stores import Blobs, Growing, Store, uploads
from coordinator.stores.connection import Connection
from coordinator.stores.uploads import Upload
from coordinator.threads import on, to_its_end
from protos.v1 import federation_pb2 as pb
from wire import spec
from wire.errors import EdgetuneError, Reason, Refused
from wire.messages import Contribution

T = TypeVar("T")
LOOK_S = 30.0
"""How often what was given up is looked for."""
REMEMBERED = 4096
"""Uploads that a process remembers as it left them."""
NAME = re.compile(r"[0-9a-f]{32}")
HEADING_BYTES = 24
"""Before the bytes of a part that is a blob: the upload's 16 bytes, then the offset, little-endian."""


PLACES = 8
"""Streams of parts read at once; of each other one part at most is in memory, and the rest waits in HTTP/2 flow control."""
TURN_S = 5.0
"""How long a stream is read before others need not wait for it any longer."""
STRETCH_BYTES, STRETCH_S = 4 << 20, 1.0
"""What a coordinator receives of an upload, and for how long, before it makes that durable: its end costs a sender no more."""
PAUSE_S = 0.2
"""Nor does a coordinator wait longer for the next part before it does so."""
Sha = Any
"""What `hashlib.sha256()` gives: `hashlib` names no type."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Bytes that begin at `offset` of an upload, with their check as the device said it: CRC-32, or SHA-256."""

    upload: str
    device: str
    offset: int
    check: int | str
    data: bytes

    @classmethod
    def from_proto(cls, message: pb.UploadPart) -> Part:
        check = message.crc32 if message.HasField("crc32") else message.digest
        return cls(message.upload, message.device, message.offset, check, message.data)

    def is_intact(self) -> bool:
        return self.check == (zlib.crc32(self.data) if isinstance(self.check, int) else spec.bytes_digest(self.data))


Parts = Arriving[pb.UploadPart, Part]


@dataclasses.dataclass(frozen=True)
class Left:
    """An upload as this process left it, and the SHA-256 of its bytes so far if all of them came through this process. They
    stay as they are: whoever adds to an upload begins where the ledger says that it ends."""

    upload: Upload
    sha: Sha | None


class Stretch:
    """Parts that come one right after the other and are named together: in a blob that grows all that come soon, elsewhere one
    alone. For one caller, who holds the blob."""

    def __init__(self, upload: Upload, blob: Growing | None, sha: Sha | None) -> None:
        self.upload, self.size, self.kept = upload, 0, uploads.GROWN
        self.blob = blob if blob is not None and blob.size() >= upload.received else None
        self.sha = sha.copy() if sha is not None else None
        self._until_s = time.monotonic() + STRETCH_S

    @property
    def end(self) -> int:
        return self.upload.received + self.size

    def takes(self, part: Part) -> bool:
        """Whether it goes on with `part`. Raises Refused for one of this upload that does not begin where it ends."""
        if self.size and self._full(part):
            return False
        if part.offset != self.end:
            raise uploads.wrong_offset((self.end,))
        return True

    def _full(self, part: Part) -> bool:
        other = (part.upload, part.device) != (self.upload.id, self.upload.device)
        return other or self.blob is None or self.size >= STRETCH_BYTES or time.monotonic() > self._until_s

    def grew(self, data: bytes) -> None:
        self.size += len(data)
        if self.sha is not None:
            self.sha.update(data)


class Uploads:
    """What devices send in parts, over one store. Raises Refused by name."""

    def __init__(self, store: Store, guards: Guards, compute: Executor, disk: Executor) -> None:
        self._store, self._guards, self._compute, self._disk = store, guards, compute, disk
        self._limits = guards.limits
        self._keep_us = int(guards.limits.keep_s * 1e6)
        self._left = dict[str, Left]()
        self._places = asyncio.Semaphore(PLACES)
        self._under_way = dict[str, asyncio.Event]()

    async def create(self, mine: Contribution) -> Upload:
        """The upload of a checked contribution, new or as far as it has come. DISK_FULL, TOO_MANY_UPLOADS."""
        await on(self._disk, self._guards.room, mine.size)
        fresh, most, most_bytes = secrets.token_hex(16), self._limits.device_uploads, self._limits.device_bytes

        def begin(db: Connection, now_us: int) -> Upload:
            return uploads.create(db, mine, fresh, most, most_bytes, self._keep_us, now_us)

        upload = await self._store.ledger.transact(begin)
        if over := self._under_way.get(upload.id):  # its stream broke, and what came on that is being made durable
            await over.wait()
            upload = await self._store.ledger.transact(begin)
        if upload.received == 0:
            await on(self._disk, self._store.blobs.grow, upload.id)
            self._leave(upload, hashlib.sha256())
        return upload

    async def receive(self, arriving: Parts) -> Upload | None:
        """Make the parts of a stream durable; their upload as far as it is then, None if there were none. WRONG_OFFSET and
        BAD_CHUNK change nothing, and what came before is durable; an upload that can no longer count ends here: ROUND_CLOSED,
        STALE_RELEASE.

        The first part, and one after a pause, is waited for outside of the places: who is slow takes none.
        """
        upload: Upload | None = None
        while (part := await arriving.next()) is not None:
            async with turn(self._places, TURN_S):
                following: Part | None = part
                while following is not None:
                    upload, following = await self._stretch(following, arriving)
        return upload

    async def append(self, message: pb.UploadPart) -> int:
        """As `receive`, of one part; where the upload ends now."""

        async def alone() -> AsyncIterator[pb.UploadPart]:
            yield message

        with self._guards.arriving(alone(), Part.from_proto) as arriving:
            upload = await self.receive(arriving)
        assert upload is not None
        return upload.received

    async def _stretch(self, part: Part, arriving: Parts) -> tuple[Upload, Part | None]:
        """Parts that come one right after the other, and are named together; the part after them, if that has come."""
        with self._guards.part_of(part.device):
            async with self._held(part.upload) as blob, self._waited_for(part.upload):
                left = self._as_left(part, blob) or await self._find(part)
                stretch = Stretch(left.upload, blob, left.sha)
                following: Part | None = part
                try:
                    while following is not None and stretch.takes(following):
                        with self._guards.in_flight(len(following.data)):
                            await on(self._disk, self._keep, stretch, following)
                        following = await arriving.next() if await arriving.soon(PAUSE_S) else None
                finally:  # a stream that breaks may end this call twice: by its end, and by being cancelled
                    upload = await to_its_end(self._name(stretch))
                return upload, following

    @contextlib.asynccontextmanager
    async def _held(self, upload: str) -> AsyncIterator[Growing | None]:
        """The blob of an upload's bytes, if they grow in one. Nobody else adds to it meanwhile: what the ledger says of its end
        stays true until it is written."""
        if not NAME.fullmatch(upload):
            raise Refused(Reason.UNKNOWN_UPLOAD, "an upload's name is 32 hexadecimal digits")
        with contextlib.ExitStack() as held:
            yield await on(self._disk, held.enter_context, self._store.blobs.growing(upload))

    @contextlib.asynccontextmanager
    async def _waited_for(self, upload: str) -> AsyncIterator[None]:
        """While a stretch is under way. In S3 there may be several of an upload, and the first to end is as good."""
        over = self._under_way.setdefault(upload, asyncio.Event())
        try:
            yield
        finally:
            self._under_way.pop(upload, None)
            over.set()

    def _as_left(self, part: Part, blob: Growing | None) -> Left | None:
        """The upload, without asking the ledger: if this process added to it last, nobody has since, or its blob were longer."""
        left = self._left.get(part.upload)
        if left is None or blob is None or part.device != left.upload.device:
            return None
        return left if blob.size() == left.upload.received == part.offset else None

    def _leave(self, upload: Upload, sha: Sha | None) -> None:
        self._left.pop(upload.id, None)
        self._left[upload.id] = Left(upload, sha)
        if len(self._left) > REMEMBERED:
            del self._left[next(iter(self._left))]

    async def _find(self, part: Part) -> Left:
        named = (part.upload, part.device)
        upload = await self._in_time(
            part.upload, self._store.ledger.look(lambda db, now_us: uploads.find(db, *named, now_us))
        )
        return Left(upload, None if upload.received else hashlib.sha256())

    async def _name(self, stretch: Stretch) -> Upload:
        """Make a stretch durable, then the end of its upload."""
        upload, size = stretch.upload, stretch.size
        if not size:
            return upload
        if stretch.blob is not None:
            await on(self._disk, stretch.blob.sync)
        named = (upload.id, upload.received, size, stretch.kept, self._keep_us)
        end = await self._in_time(
            upload.id, self._store.ledger.transact(lambda db, now_us: uploads.append(db, *named, now_us))
        )
        upload = dataclasses.replace(upload, received=end)
        self._leave(upload, stretch.sha)
        return upload

    async def _in_time(self, name: str, answer: Awaitable[T]) -> T:
        """What the ledger answers of an upload. One that comes too late to count ends here."""
        try:
            return await answer
        except Refused as error:
            if error.reason in (Reason.ROUND_CLOSED, Reason.STALE_RELEASE):
                reason = error.reason
                unnamed = await self._store.ledger.transact(lambda db, _: uploads.close(db, name, reason))
                await on(self._disk, delete, self._store.blobs, unnamed)
            raise

    def _keep(self, stretch: Stretch, part: Part) -> None:
        data = part.data
        if not 0 < len(data) <= stretch.upload.size - part.offset:
            raise Refused(Reason.BAD_SIZE, f"{stretch.upload.size - part.offset} bytes are to come, not {len(data)}")
        if not part.is_intact():
            raise Refused(Reason.BAD_CHUNK, "a part was damaged on its way", offset=stretch.end)
        self._guards.room(len(data))
        if stretch.blob is not None:
            stretch.blob.write(part.offset, data)
        else:
            stretch.kept = self._as_blob(stretch, data)
        stretch.grew(data)

    def _as_blob(self, stretch: Stretch, data: bytes) -> str:
        with self._store.blobs.writer(None, HEADING_BYTES + len(data)) as writer:
            writer.write(bytes.fromhex(stretch.upload.id) + stretch.end.to_bytes(8, "little"))
            writer.write(data)
            return writer.commit()

    async def finish(self, mine: Contribution, by: Rules) -> None:
        """One durable blob of an upload's bytes, examined. A payload that came otherwise is only examined.

        WRONG_OFFSET if bytes are missing; PayloadError as `ingest.examine`.
        """
        upload, parts = await self._store.ledger.look(lambda db, _: uploads.with_parts(db, mine))
        if upload is None:
            return await self._examine(mine, mine.digest, by)
        if upload.received != upload.size:
            raise uploads.wrong_offset((upload.received,))
        try:
            await self._finish(upload, parts, mine, by)
        except Refused as error:
            if error.reason is Reason.UNKNOWN_BLOB:  # a part is gone: the rest is of no use
                await self.forget(mine)
            raise

    async def _finish(self, upload: Upload, parts: list[str], mine: Contribution, by: Rules) -> None:
        if parts != [uploads.GROWN]:
            await on(self._disk, self._join, mine, parts)
            return await self._examine(mine, mine.digest, by)
        async with self._held(upload.id) as blob:
            await self._examine(mine, upload.id, by, self._digest(upload))
            if blob is not None:  # else `get` has refused it
                await on(self._disk, blob.finish, mine.digest)

    def _digest(self, upload: Upload) -> str | None:
        """The SHA-256 of an upload that is whole, if all of it came through this process."""
        left = self._left.pop(upload.id, None)
        return left.sha.hexdigest() if left and left.sha and left.upload.received == upload.size else None

    async def _examine(self, mine: Contribution, name: str, by: Rules, digest: str | None = None) -> None:
        """Mapped only while it is looked at: memory does not grow with those that wait."""
        await on(self._compute, lambda: ingest.examine(mine, self._store.blobs.get(name), by, digest))

    def _join(self, mine: Contribution, parts: list[str]) -> None:
        self._guards.room(mine.size)
        with self._store.blobs.writer(mine.digest, mine.size) as whole:
            for part in parts:
                whole.write(self._store.blobs.get(part)[HEADING_BYTES:])
            whole.commit()

    async def forget(self, mine: Contribution) -> None:
        """The contribution is counted, or never will be: its parts are deleted. Idempotent."""
        unnamed = await self._store.ledger.transact(lambda db, _: uploads.forget_of(db, mine))
        await on(self._disk, delete, self._store.blobs, unnamed)


async def forget_expired(store: Store) -> int:
    """Delete what its device has given up; how many parts that were."""
    unnamed = await store.ledger.transact(uploads.forget_expired)
    await asyncio.to_thread(delete, store.blobs, unnamed)
    return len(unnamed)


async def forget_expired_now_and_then(store: Store) -> None:
    """For ever. A store that does not answer is asked again the next time."""
    while True:
        with contextlib.suppress(Refused):
            await forget_expired(store)
        await asyncio.sleep(LOOK_S)


def delete(blobs: Blobs, unnamed: Iterable[str]) -> None:
    """As far as the store lets: what stays is garbage, and `gc` finds it."""
    with contextlib.suppress(EdgetuneError):
        for digest in unnamed:
            blobs.delete(digest)
