"""What no row names: an upload that was given up, the work of a closer that lost. Garbage, never damage."""

from __future__ import annotations

import asyncio
import dataclasses

from coordinator.stores import Blobs, Store, uploads
from wire.errors import Reason, Refused, UserError

LEAST_GRACE_S = 300.0
"""Longer than any request lies between its blob and the row that names it; a put again makes a blob new."""


@dataclasses.dataclass(frozen=True)
class Swept:
    blobs: int = 0
    bytes: int = 0


async def sweep(store: Store, grace_s: float, dry_run: bool) -> Swept:
    """Delete blobs that are older than `grace_s` and that no row names; coordinators may go on meanwhile.

    The old ones are listed first and the rows read after: what a row names by then is spared, and what none names by
    then, a request of now would have to put again, which makes it new. Raises UserError for a grace that is too short.
    """
    if grace_s < LEAST_GRACE_S and not dry_run:
        raise UserError(f"--grace: at least {LEAST_GRACE_S:.0f}s, or an update under way could lose its bytes")
    try:
        if not dry_run:
            await store.ledger.transact(uploads.forget_expired)
        old = await asyncio.to_thread(lambda: set(store.blobs.older(grace_s)))
        growing = await store.ledger.look(lambda db, _: uploads.names(db))
        unnamed = old - growing - await store.ledger.named_blobs()
        return await asyncio.to_thread(_delete, store.blobs, unnamed, grace_s, dry_run)
    finally:
        await store.ledger.close()


def _delete(blobs: Blobs, unnamed: set[str], grace_s: float, dry_run: bool) -> Swept:
    total = Swept()
    for digest in unnamed & set(blobs.older(grace_s)):
        try:
            size = blobs.size(digest)
        except Refused as error:
            if error.reason is Reason.UNKNOWN_BLOB:  # another sweep was faster
                continue
            raise
        if not dry_run:
            blobs.delete(digest)
        total = Swept(total.blobs + 1, total.bytes + size)
    return total
