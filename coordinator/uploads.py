"""Large updates on their way in: parts that become durable one by one, then the whole that they make.

Where blobs can grow, parts are written to one, which becomes the update when it is whole. Elsewhere a part is a blob headed by
its upload and offset, so that no two uploads share one and it may be deleted with its row. The ledger alone says how far an
upload is: a replica that takes a part needs nothing of the one that took the part before.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Iterable
from concurrent.futures import Executor
from typing import Protocol, TypeVar

from coordinator import ingest
from coordinator.guards import Guards
from coordinator.publish import Rules
from coordinator.stores import Blobs, Growing, Store, uploads
from coordinator.stores.uploads import Upload
from coordinator.threads import on
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


class Part(Protocol):
    """A part as it came: `protos.v1` UploadPart."""

    @property
    def upload(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def offset(self) -> int: ...

    @property
    def digest(self) -> str: ...

    @property
    def data(self) -> bytes: ...


class Uploads:
    """What devices send in parts, over one store. Raises Refused by name."""

    def __init__(self, store: Store, guards: Guards, compute: Executor, disk: Executor) -> None:
        self._store, self._guards, self._compute, self._disk = store, guards, compute, disk
        self._limits = guards.limits
        self._keep_us = int(guards.limits.keep_s * 1e6)
        self._left = dict[str, Upload]()

    async def create(self, mine: Contribution) -> Upload:
        """The upload of a checked contribution, new or as far as it has come. DISK_FULL, TOO_MANY_UPLOADS."""
        await on(self._disk, self._guards.room, mine.size)
        fresh, most, most_bytes = secrets.token_hex(16), self._limits.device_uploads, self._limits.device_bytes
        upload = await self._store.ledger.transact(
            lambda db, now_us: uploads.create(db, mine, fresh, most, most_bytes, self._keep_us, now_us)
        )
        if upload.received == 0:
            await on(self._disk, self._store.blobs.grow, upload.id)
            self._leave(upload)
        return upload

    async def append(self, part: Part) -> int:
        """Make a part durable; where the upload ends now. WRONG_OFFSET and BAD_CHUNK change nothing; one that
        can no longer count ends here: ROUND_CLOSED, STALE_RELEASE."""
        size = len(part.data)
        with self._guards.in_flight(size), self._guards.part_of(part.device):
            async with self._held(part.upload) as blob:
                upload = self._as_left(part, blob) or await self._find(part)
                if part.offset != upload.received:
                    raise uploads.wrong_offset((upload.received,))
                if not 0 < size <= upload.size - part.offset:
                    raise Refused(Reason.BAD_SIZE, f"{upload.size - part.offset} bytes are to come, not {size}")
                kept = await on(self._disk, self._keep, upload, part, blob)
                return await self._name(part, kept, upload)

    @contextlib.asynccontextmanager
    async def _held(self, upload: str) -> AsyncIterator[Growing | None]:
        """The blob of an upload's bytes, if they grow in one. Nobody else adds to it meanwhile: what the ledger says of its end
        stays true until it is written."""
        if not NAME.fullmatch(upload):
            raise Refused(Reason.UNKNOWN_UPLOAD, "an upload's name is 32 hexadecimal digits")
        with contextlib.ExitStack() as held:
            yield await on(self._disk, held.enter_context, self._store.blobs.growing(upload))

    def _as_left(self, part: Part, blob: Growing | None) -> Upload | None:
        """The upload, without asking the ledger: if this process added to it last, nobody has since, or its blob were longer."""
        upload = self._left.get(part.upload)
        if upload is None or blob is None or part.device != upload.device:
            return None
        return upload if blob.size() == upload.received == part.offset else None

    def _leave(self, upload: Upload) -> None:
        self._left.pop(upload.id, None)
        if upload.received < upload.size:
            self._left[upload.id] = upload
        if len(self._left) > REMEMBERED:
            del self._left[next(iter(self._left))]

    async def _find(self, part: Part) -> Upload:
        named = (part.upload, part.device)
        return await self._in_time(
            part.upload, self._store.ledger.look(lambda db, now_us: uploads.find(db, *named, now_us))
        )

    async def _name(self, part: Part, kept: str, upload: Upload) -> int:
        named = (upload.id, part.offset, len(part.data), kept, self._keep_us)
        end = await self._in_time(
            upload.id, self._store.ledger.transact(lambda db, now_us: uploads.append(db, *named, now_us))
        )
        self._leave(dataclasses.replace(upload, received=end))
        return end

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

    def _keep(self, upload: Upload, part: Part, blob: Growing | None) -> str:
        """The only place that copies the bytes out of their message: as many copies at once as there are disk threads. What the
        part's row is to name."""
        data = part.data
        if spec.bytes_digest(data) != part.digest:
            raise Refused(Reason.BAD_CHUNK, "a part was damaged on its way", offset=upload.received)
        self._guards.room(len(data))
        if blob is not None and blob.size() >= part.offset:
            blob.write(part.offset, data)
            return uploads.GROWN
        with self._store.blobs.writer(None, HEADING_BYTES + len(data)) as writer:
            writer.write(bytes.fromhex(upload.id) + upload.received.to_bytes(8, "little"))
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
            await self._examine(mine, upload.id, by)
            if blob is not None:  # else `get` has refused it
                await on(self._disk, blob.finish, mine.digest)

    async def _examine(self, mine: Contribution, name: str, by: Rules) -> None:
        """Mapped only while it is looked at: memory does not grow with those that wait."""
        await on(self._compute, lambda: ingest.examine(mine, self._store.blobs.get(name), by))

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
