"""From sealed round to release: what a coordinator does between two calls. Any process may do it, and do it twice."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Executor

from coordinator import blame, publish
from coordinator.bell import Bell
from coordinator.events import Events, unheard
from coordinator.identities import Identities
from coordinator.meter import Times
from coordinator.rounds import Round
from coordinator.rules import Rules
from coordinator.stores import Store
from wire.errors import Diverged, Reason, Refused, StoreError
from wire.messages import Contribution, ReleaseManifest

IDLE_S = 1.0
"""How often deadlines are looked at, and rounds that another process sealed are found."""

PASSING = {Reason.BUSY, Reason.DISK_FULL}
"""A store that does not answer, or has no room, may again: the round stays sealed until then."""


async def close_rounds(
    store: Store,
    compute: Executor,
    accepted: Bell,
    changed: Bell,
    work: Bell,
    combining: Times,
    who: Identities | None = None,
    events: Events = unheard,
) -> None:
    """For ever: let overdue rounds end, combine sealed ones, ring `work` whenever a round has opened or a run ended.

    It looks when this process has `accepted` an update, and now and then: of many replicas the one that sealed a round
    combines it at once, and the others find it sealed only if that one has died, or is slow.
    """
    while True:
        ticket = accepted.ticket()
        try:
            did = await _close_due(store, compute, work, combining, who, events)
        except Refused as error:
            if error.reason not in PASSING:
                raise
            did = False
        if did:
            work.ring()
            changed.ring()
        else:
            await accepted.wait(ticket, IDLE_S)


async def _close_due(
    store: Store,
    compute: Executor,
    work: Bell,
    combining: Times,
    who: Identities | None,
    events: Events = unheard,
) -> bool:
    """Whether any round ended."""
    ended = await store.ledger.tick()
    for name, left in ended:
        if left.state == "abandoned":
            events("abandoned", run=name, round=left.number, attempt=left.attempt, updates=left.accepted)
    sealed = await store.ledger.sealed()
    if sealed:
        work.ring()  # a buffer that sealed has its successor open: devices need not wait for what is combined here
    for name, round_ in sealed:
        events("sealed", run=name, round=round_.number, updates=round_.accepted)
        try:
            with combining.timed():
                await _announced(store, compute, name, round_, who, events)
        except Diverged as error:
            if await store.ledger.fail(name, round_, str(error)):
                events("failed", run=name, round=round_.number)
        except Exception as error:  # whatever it is: one run's mistake would end every run here, at every start again
            await _broken(store, compute, name, round_, error, events)
    return bool(ended or sealed)


async def _broken(store: Store, compute: Executor, name: str, sealed: Round, error: Exception, events: Events) -> None:
    """End the run that met a mistake of ours. Raises the error where the store or machine is in trouble, and StoreError where
    a blob is damaged: that looks like any mistake."""
    found = blame.mistake(error)
    if found is None:
        raise error
    await _check_blobs(store, compute, name, sealed)
    if await store.ledger.fail(name, sealed, found.sentence(sealed.number)):
        events("broken", run=name, round=sealed.number, kind=found.kind, place=found.place)


async def _check_blobs(store: Store, compute: Executor, name: str, sealed: Round) -> None:
    parent = await store.ledger.release(name, sealed.base_version)
    accepted = await store.ledger.contributions(name, sealed.number, sealed.attempt)
    named = (*parent.blobs, *(contribution.digest for contribution in accepted))
    damage = await asyncio.get_running_loop().run_in_executor(compute, publish.damage, named, store.blobs)
    if damage is not None:
        raise StoreError(f"run {name}: {damage}")


async def _announced(
    store: Store, compute: Executor, name: str, sealed: Round, who: Identities | None, events: Events
) -> None:
    began = time.perf_counter()
    release = await close(store, compute, name, sealed, who)
    if release is not None:
        about = {"version": release.version, "release": release.digest, "updates": sealed.accepted}
        events("published", run=name, seconds=round(time.perf_counter() - began, 3), **about)


async def close(
    store: Store, compute: Executor, name: str, sealed: Round, who: Identities | None = None
) -> ReleaseManifest | None:
    """Combine one sealed round, sign and publish it; whoever publishes first wins, and both computed the same bytes. The
    release, None where another was first. Raises Diverged."""
    run, since_us = await store.ledger.run(name), await store.ledger.now_us()
    parent = await store.ledger.release(name, sealed.base_version)
    accepted = await store.ledger.contributions(name, sealed.number, sealed.attempt)
    by = Rules.of(run.spec, run.layout)
    release = await asyncio.get_running_loop().run_in_executor(compute, _combine, by, parent, accepted, store)
    if who is not None:
        await who.sign(release.digest)
    return release if await store.ledger.publish(name, sealed, release, since_us) else None


async def hear_others(store: Store, changed: Bell, work: Bell) -> None:
    """For ever: ring when another process of the same store has changed something, `work` if devices may have to do now."""
    while True:
        try:
            async for may_be_work in store.ledger.others():
                changed.ring()
                if may_be_work:
                    work.ring()
        except Refused as error:
            if error.reason not in PASSING:
                raise
            await asyncio.sleep(IDLE_S)


def _combine(by: Rules, parent: ReleaseManifest, accepted: list[Contribution], store: Store) -> ReleaseManifest:
    made = publish.combine(by, parent, accepted, store.blobs)
    for blob in made.blobs:
        store.blobs.put(blob)
    return made.release
