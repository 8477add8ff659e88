"""What no row names: an upload that was given up, the work of a closer that lost. Garbage, never damage."""

from __future__ import annotations

import asyncio
import dataclasses
import secrets

from coordinator.stores import Blobs, Store, deletions, uploads
from wire.errors import Reason, Refused, UserError

LEAST_GRACE_S = 300.0
"""Longer than most requests lie between their blob and the row that names it; one that is slower has to put it again."""


@dataclasses.dataclass(frozen=True)
class Swept:
    blobs: int = 0
    bytes: int = 0


async def sweep(store: Store, grace_s: float, dry_run: bool) -> Swept:
    """Delete blobs that are older than `grace_s` and that no row names; coordinators may go on meanwhile.

    What is deleted is written down first, in the transaction that finds that no row names it: from then on none can, until
    it is put again. Raises UserError for a grace that is too short.
    """
    if grace_s < LEAST_GRACE_S and not dry_run:
        raise UserError(f"--grace: at least {LEAST_GRACE_S:.0f}s, or an update under way could lose its bytes")
    try:
        if not dry_run:
            await store.ledger.transact(uploads.forget_expired)
        old = await asyncio.to_thread(lambda: set(store.blobs.older(grace_s)))
        unnamed = old - await store.ledger.look(lambda db, _: deletions.wanted(db))
        if dry_run or not unnamed:
            return await asyncio.to_thread(_swept, store.blobs, unnamed, False)
        sweep = secrets.token_hex(8)
        marked = await store.ledger.transact(lambda db, now_us: deletions.mark(db, unnamed, sweep, now_us))
        swept = await asyncio.to_thread(_swept, store.blobs, marked, True)
        await store.ledger.transact(lambda db, now_us: deletions.gone(db, sweep, now_us))
        return swept
    finally:
        await store.ledger.close()


def _swept(blobs: Blobs, unnamed: set[str], delete: bool) -> Swept:
    total = Swept()
    for digest in unnamed:
        try:
            size = blobs.size(digest)
        except Refused as error:
            if error.reason is Reason.UNKNOWN_BLOB:  # another sweep was faster
                continue
            raise
        if delete:
            blobs.delete(digest)
        total = Swept(total.blobs + 1, total.bytes + size)
    return total
