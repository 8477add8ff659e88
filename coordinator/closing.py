"""From sealed round to release: what a coordinator does between two calls. Any process may do it, and do it twice."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor

from coordinator import publish
from coordinator.bell import Bell
from coordinator.identities import Identities
from coordinator.publish import Rules
from coordinator.rounds import Round
from coordinator.stores import Store
from wire.messages import Contribution, ReleaseManifest

IDLE_S = 1.0
"""How often deadlines are looked at, and rounds that another process sealed are found."""


async def close_rounds(
    store: Store, compute: Executor, changed: Bell, work: Bell, who: Identities | None = None
) -> None:
    """For ever: let overdue rounds end, combine sealed ones, ring `work` whenever a round has opened or a run ended."""
    while True:
        ticket = changed.ticket()
        ended = await store.ledger.tick()
        sealed = await store.ledger.sealed()
        for name, round_ in sealed:
            await close(store, compute, name, round_, who)
        if ended or sealed:
            work.ring()
            changed.ring()
        else:
            await changed.wait(ticket, IDLE_S)


async def close(store: Store, compute: Executor, name: str, sealed: Round, who: Identities | None = None) -> None:
    """Combine one sealed round, sign and publish it; whoever publishes first wins, and both computed the same bytes."""
    run = await store.ledger.run(name)
    parent = await store.ledger.release(name, sealed.base_version)
    accepted = await store.ledger.contributions(name, sealed.number, sealed.attempt)
    by = publish.rules(run.spec, run.layout)
    release = await asyncio.get_running_loop().run_in_executor(compute, _combine, by, parent, accepted, store)
    if who is not None:
        await who.sign(release.digest)
    await store.ledger.publish(name, sealed, release)


def _combine(by: Rules, parent: ReleaseManifest, accepted: list[Contribution], store: Store) -> ReleaseManifest:
    made = publish.combine(by, parent, accepted, store.blobs)
    for blob in made.blobs:
        store.blobs.put(blob)
    return made.release
