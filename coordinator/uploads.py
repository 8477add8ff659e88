"""Large updates on their way in: parts that become durable one by one, then the whole that they make.

A part is a blob headed by its upload and offset, so that no two uploads share one and it may be deleted with its row. The
ledger alone says how far an upload is: a replica that takes a part needs nothing of the one that took the part before.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Iterable
from concurrent.futures import Executor
from typing import Protocol

from coordinator.guards import Guards
from coordinator.stores import Blobs, Store, uploads
from coordinator.stores.uploads import Upload
from coordinator.threads import on
from wire import spec
from wire.errors import EdgetuneError, Reason, Refused
from wire.messages import Contribution

LOOK_S = 30.0
"""How often what was given up is looked for."""
HEADING_BYTES = 24
"""Before the bytes of each part: the upload's 16 bytes, then the offset, little-endian."""


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

    def __init__(self, store: Store, guards: Guards, disk: Executor) -> None:
        self._store, self._guards, self._disk = store, guards, disk
        self._limits = guards.limits
        self._keep_us = int(guards.limits.keep_s * 1e6)

    async def create(self, mine: Contribution) -> Upload:
        """The upload of a checked contribution, new or as far as it has come. DISK_FULL, TOO_MANY_UPLOADS."""
        await on(self._disk, self._guards.room, 2 * mine.size)  # in parts, and as a whole
        fresh, most, most_bytes = secrets.token_hex(16), self._limits.device_uploads, self._limits.device_bytes
        return await self._store.ledger.transact(
            lambda db, now_us: uploads.create(db, mine, fresh, most, most_bytes, self._keep_us, now_us)
        )

    async def append(self, part: Part) -> int:
        """Make a part durable; where the upload ends now. WRONG_OFFSET and BAD_CHUNK change nothing; one that
        can no longer count ends here: ROUND_CLOSED, STALE_RELEASE."""
        size = len(part.data)
        with self._guards.in_flight(size), self._guards.part_of(part.device):
            upload = await self._find(part.upload, part.device)
            if part.offset != upload.received:
                raise uploads.wrong_offset((upload.received,))
            if not 0 < size <= upload.size - part.offset:
                raise Refused(Reason.BAD_SIZE, f"{upload.size - part.offset} bytes are to come, not {size}")
            kept = await on(self._disk, self._keep, upload, part)
            return await self._store.ledger.transact(
                lambda db, now_us: uploads.append(db, upload.id, part.offset, size, kept, self._keep_us, now_us)
            )

    async def _find(self, name: str, device: str) -> Upload:
        try:
            return await self._store.ledger.look(lambda db, now_us: uploads.find(db, name, device, now_us))
        except Refused as error:
            if error.reason in (Reason.ROUND_CLOSED, Reason.STALE_RELEASE):
                reason = error.reason
                unnamed = await self._store.ledger.transact(lambda db, _: uploads.close(db, name, reason))
                await on(self._disk, delete, self._store.blobs, unnamed)
            raise

    def _keep(self, upload: Upload, part: Part) -> str:
        """The only place that copies the bytes out of their message: as many copies at once as there are disk threads."""
        data = part.data
        if spec.bytes_digest(data) != part.digest:
            raise Refused(Reason.BAD_CHUNK, "a part was damaged on its way", offset=upload.received)
        self._guards.room(len(data))
        with self._store.blobs.writer(None, HEADING_BYTES + len(data)) as blob:
            blob.write(bytes.fromhex(upload.id) + upload.received.to_bytes(8, "little"))
            blob.write(data)
            return blob.commit()

    async def join(self, mine: Contribution) -> None:
        """Make one blob of an upload's parts, durable and checked. Nothing to do for a payload that came otherwise.

        WRONG_OFFSET if bytes are missing, BAD_DIGEST if they are others than declared.
        """
        upload = await self._store.ledger.look(lambda db, _: uploads.of(db, mine))
        if upload is None:
            return
        if upload.received != upload.size:
            raise uploads.wrong_offset((upload.received,))
        parts = await self._store.ledger.look(lambda db, _: uploads.parts(db, upload.id))
        try:
            await on(self._disk, self._join, mine, parts)
        except Refused as error:
            if error.reason is Reason.UNKNOWN_BLOB:  # a part is gone: the rest is of no use
                await self.forget(mine)
            raise

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
