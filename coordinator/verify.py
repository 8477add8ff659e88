"""`edgetune run verify`: compute every release of a run again from stored updates, and check the chain."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from coordinator import publish
from coordinator.exactness import aggregation_error
from coordinator.rules import Rules
from coordinator.stores import Blobs, Store, devices
from coordinator.stores.connection import Connection
from coordinator.tolerance import TOLERANCE, agrees
from wire import certificates, spec
from wire.errors import EdgetuneError, Reason, Refused
from wire.messages import Contribution, ReleaseManifest


@dataclasses.dataclass(frozen=True)
class Checked:
    """The verdict on one release; `fault` is None if it is what its contributions make, and signed if it should be.

    All is computed again bit for bit, with two exceptions. A coded delta may be another than this machine's encoder makes
    (`coded_here` is False then) if it sends as much and all else follows from it: an encoder may choose by a logarithm that
    machines round differently, and zstd's bytes depend on its version. And what an aggregator makes that is not `bitwise`
    may differ in its last bits (`same_bits` is False then): see `tolerance.agrees`.

    `aggregation_error` says how exact the aggregate is (`exactness.aggregation_error`).
    """

    version: int
    digest: str
    contributions: int
    fault: str | None
    signed: bool = False
    coded_here: bool = True
    same_bits: bool = True
    aggregation_error: float | None = None

    @property
    def sentence(self) -> str:
        if self.fault is not None:
            return self.fault
        said = {
            "ok": True,
            "its delta was coded otherwise than this machine would": not self.coded_here,
            f"agrees to {TOLERANCE:g}, not bit for bit": not self.same_bits,
            f"aggregation error {self.aggregation_error or 0:.1e}": self.aggregation_error is not None,
        }
        return "; ".join(part for part, so in said.items() if so)


SLACK = 1.01
"""How much more than this machine's a delta may leave unsent, in energy."""


async def verify(store: Store, name: str, release_key: str | None = None) -> list[Checked]:
    """One verdict a release, oldest first. With a release key, every release of a run that has any signature must have that
    key's; without one, signatures are not looked at. Raises Refused(UNKNOWN_RUN)."""
    run = await store.ledger.run(name)
    by = Rules.of(run.spec, run.layout)
    newest = (await store.ledger.release(name, None)).version
    releases = [await store.ledger.release(name, version) for version in range(newest + 1)]
    verdicts = [_check_initial(by, releases[0], store)]
    for parent, release in itertools.pairwise(releases):
        accepted = await _accepted(store, name, release)
        verdicts.append(_check(by, parent, release, accepted, store))
    return verdicts if release_key is None else await _with_signatures(store, verdicts, release_key)


async def _with_signatures(store: Store, verdicts: list[Checked], release_key: str) -> list[Checked]:
    found = [await store.ledger.look(_signature(verdict.digest)) for verdict in verdicts]
    if not any(found):
        return verdicts
    return [_signed(verdict, signature, release_key) for verdict, signature in zip(verdicts, found, strict=True)]


def _signature(digest: str) -> Callable[[Connection, int], str | None]:
    return lambda db, _: devices.signature(db, digest)


def _signed(verdict: Checked, signature: str | None, release_key: str) -> Checked:
    if signature is not None and certificates.is_signed(verdict.digest, signature, release_key):
        return dataclasses.replace(verdict, signed=True)
    fault = "it is not signed" if signature is None else "its signature is not the coordinator's"
    return dataclasses.replace(verdict, fault=verdict.fault or fault)


async def _accepted(store: Store, name: str, release: ReleaseManifest) -> list[Contribution]:
    attempt = await store.ledger.attempt(name, release.version)
    return await store.ledger.contributions(name, release.version, attempt)


def _check_initial(by: Rules, release: ReleaseManifest, store: Store) -> Checked:
    expected = publish.initial(by.spec, by.layout, release.adapter or "")
    fault = None if release == expected else "release 0 is not the one this run was created with"
    return Checked(0, release.digest, 0, fault or publish.damage(release.blobs, store.blobs))


def _check(
    by: Rules,
    parent: ReleaseManifest,
    release: ReleaseManifest,
    accepted: list[Contribution],
    store: Store,
) -> Checked:
    verdict = Checked(release.version, release.digest, len(accepted), None)
    try:
        verdict = _compared(verdict, by, parent, release, accepted, store.blobs)
        error = aggregation_error(by, parent, accepted, store.blobs) if verdict.fault is None else None
    except EdgetuneError as wrong:
        if isinstance(wrong, Refused) and wrong.reason is Reason.BUSY:
            raise  # a store that does not answer says nothing of the release
        return dataclasses.replace(verdict, fault=str(wrong))
    named = (*release.blobs, *(contribution.digest for contribution in accepted))
    return dataclasses.replace(
        verdict, fault=verdict.fault or publish.damage(named, store.blobs), aggregation_error=error
    )


def _compared(
    verdict: Checked,
    by: Rules,
    parent: ReleaseManifest,
    release: ReleaseManifest,
    accepted: list[Contribution],
    blobs: Blobs,
) -> Checked:
    """The verdict, with what is wrong with a release and how it differs from what this machine makes."""
    again = publish.combine(by, parent, accepted, blobs)
    if again.release == release:
        return verdict
    if release.delta and by.downlink:
        given = publish.combine(by, parent, accepted, blobs, blobs.get(release.delta))
        agreed = _agreed(verdict, by, parent, release, given, blobs)
        if agreed.fault is None:
            coded_here = again.release.delta == release.delta
            good = coded_here or _unsent(given) <= SLACK * _unsent(again)
            fault = None if good else "its delta sends less of the sum than the downlink's codec does"
            return dataclasses.replace(agreed, fault=fault, coded_here=coded_here)
    return _agreed(verdict, by, parent, release, again, blobs)


def _agreed(
    verdict: Checked,
    by: Rules,
    parent: ReleaseManifest,
    release: ReleaseManifest,
    made: publish.Made,
    blobs: Blobs,
) -> Checked:
    """Whether the release is what was made here, or near enough where the aggregator sums floating point."""
    if made.release == release:
        return verdict
    if not by.aggregator.bitwise and agrees(by.layout, parent, release, made, blobs):
        return dataclasses.replace(verdict, same_bits=False)
    fields = [f.name for f in dataclasses.fields(release) if getattr(made.release, f.name) != getattr(release, f.name)]
    return dataclasses.replace(verdict, fault=f"computed again, it differs in {', '.join(fields)}")


def _unsent(made: publish.Made) -> float:
    """The energy of a release's residual."""
    residual = next(blob for blob in made.blobs if spec.bytes_digest(blob) == made.release.residual)
    return float(np.square(np.frombuffer(residual, "<f4").astype(np.float64)).sum())
