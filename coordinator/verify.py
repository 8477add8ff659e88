"""`edgetune run verify`: compute every release of a run again from stored updates, bit for bit, and check the chain."""

from __future__ import annotations

import dataclasses
import itertools

from coordinator import publish
from coordinator.stores import Store
from wire import spec
from wire.errors import EdgetuneError, Reason, Refused, StoreError
from wire.messages import Contribution, ReleaseManifest


@dataclasses.dataclass(frozen=True)
class Checked:
    """The verdict on one release; `fault` is None if it is what its contributions make."""

    version: int
    digest: str
    contributions: int
    fault: str | None


async def verify(store: Store, name: str) -> list[Checked]:
    """One verdict a release, oldest first. Raises Refused(UNKNOWN_RUN)."""
    run = await store.ledger.run(name)
    by = publish.rules(run.spec, run.layout)
    newest = (await store.ledger.release(name, None)).version
    releases = [await store.ledger.release(name, version) for version in range(newest + 1)]
    verdicts = [_check_initial(by, releases[0], store)]
    for parent, release in itertools.pairwise(releases):
        accepted = await _accepted(store, name, release)
        verdicts.append(_check(by, parent, release, accepted, store))
    return verdicts


async def _accepted(store: Store, name: str, release: ReleaseManifest) -> list[Contribution]:
    attempt = await store.ledger.attempt(name, release.version)
    return await store.ledger.contributions(name, release.version, attempt)


def _check_initial(by: publish.Rules, release: ReleaseManifest, store: Store) -> Checked:
    expected = publish.initial(by.spec, by.layout, release.adapter or "")
    fault = None if release == expected else "release 0 is not the one this run was created with"
    return Checked(0, release.digest, 0, fault or _damage(release, store))


def _check(
    by: publish.Rules,
    parent: ReleaseManifest,
    release: ReleaseManifest,
    accepted: list[Contribution],
    store: Store,
) -> Checked:
    return Checked(
        release.version,
        release.digest,
        len(release.contributions),
        _difference(by, parent, release, accepted, store) or _damage(release, store),
    )


def _difference(
    by: publish.Rules,
    parent: ReleaseManifest,
    release: ReleaseManifest,
    accepted: list[Contribution],
    store: Store,
) -> str | None:
    try:
        again = publish.combine(by, parent, accepted, store.blobs).release
    except EdgetuneError as error:
        if isinstance(error, Refused) and error.reason is Reason.BUSY:
            raise  # a store that does not answer says nothing of the release
        return str(error)
    if again == release:
        return None
    fields = [f.name for f in dataclasses.fields(release) if getattr(again, f.name) != getattr(release, f.name)]
    return f"computed again, it differs in {', '.join(fields)}"


def _damage(release: ReleaseManifest, store: Store) -> str | None:
    named = (release.adapter, release.optimizer_state, release.step, *(s.digest for s in release.contributions))
    for digest in filter(None, named):
        try:
            data = store.blobs.get(digest)
        except StoreError as error:
            return str(error)
        except Refused as error:
            if error.reason is not Reason.UNKNOWN_BLOB:
                raise
            return f"blob {digest[:12]}… is gone"
        if spec.bytes_digest(data) != digest:
            return f"blob {digest[:12]}… is damaged"
    return None
