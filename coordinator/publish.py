"""Sealed contributions to a release, as a pure function of stored bytes: anybody may compute it again.

`combine` is used twice: by a coordinator that closes a round, and by `edgetune run verify` that checks one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from coordinator.aggregators.staleness import discount, fitted
from coordinator.rules import Rules
from coordinator.stores import Blobs
from wire import spec
from wire.codecs.chain import Chain
from wire.delta import Delta, Layout, Vector
from wire.errors import Diverged, PayloadError, Reason, Refused, StoreError
from wire.messages import Contribution, ReleaseManifest, Share
from wire.portions import Part, Portion
from wire.prng import Strand, Units
from wire.run_spec import RunSpec
from wire.scalars import Scalars, Step, Trajectory

Stored = bytes | memoryview
LARGEST_CODED = np.float32(2.0**100)
"""A step with a larger entry is not coded: stages add up entries times integers, and scale them, in float32."""


def initial(run: RunSpec, layout: Layout, adapter_digest: str) -> ReleaseManifest:
    """Release 0: what the run was created with."""
    return ReleaseManifest.first(run, layout, adapter_digest)


@dataclasses.dataclass(frozen=True, eq=False)
class Made:
    """A release, and the bytes that it names and that are not stored yet."""

    release: ReleaseManifest
    blobs: tuple[Stored, ...]


def combine(
    by: Rules, parent: ReleaseManifest, accepted: list[Contribution], blobs: Blobs, delta: Stored | None = None
) -> Made:
    """The next release. `accepted` may come in any order; a coded `delta` that is given is taken for what the downlink would
    encode. Raises StoreError for a blob that is missing or damaged, Diverged for an adapter that would not be finite."""
    shares = shares_of(by, accepted, blobs)
    return _step(by, parent, shares, blobs) if by.codec is None else _adapter(by, parent, shares, blobs, delta)


def shares_of(by: Rules, accepted: Iterable[Contribution], blobs: Blobs) -> tuple[Share, ...]:
    """What each contribution counts, in the order of the devices: by the rules and, in a buffer, by what the ledger said of it
    as it came in."""
    accepted = sorted(accepted, key=lambda c: c.device)
    weights = [by.aggregator.weight(c, _noise(by, c, blobs)) for c in accepted]
    if by.spec.cohort.mode != "async":
        return tuple(Share(c.device, c.digest, weight) for c, weight in zip(accepted, weights, strict=True))
    discounted = fitted([w * discount(c.staleness or 0) for c, w in zip(accepted, weights, strict=True)])
    return tuple(
        Share(c.device, c.digest, weight, c.round, c.staleness) for c, weight in zip(accepted, discounted, strict=True)
    )


def _origin(share: Share, number: int) -> int:
    """The round whose directions a device was given: of a buffer's update, that of its task."""
    return number if share.round is None else share.round


def _noise(by: Rules, contribution: Contribution, blobs: Blobs) -> float:
    return by.noise(by.read(stored(blobs, contribution.digest))) if by.directions else 0.0


def _adapter(by: Rules, parent: ReleaseManifest, shares: tuple[Share, ...], blobs: Blobs, delta: Stored | None) -> Made:
    adapter, state = _previous(by, parent, blobs)
    with np.errstate(over="ignore", invalid="ignore"):  # looked at as a whole
        step, state = by.optimizer.step(fold(by, shares, parent.version + 1, adapter, blobs), state)
    _check_finite(step, parent)
    coded: dict[str, Stored] = {}
    if by.downlink is not None:
        step, coded = _coded(by, by.downlink, parent, step, blobs, delta)
        coded["shares"], shares = spec.canonical(shares), ()
    adapter = adapter + step
    _check_finite(adapter, parent)
    kept: dict[str, Stored] = {"adapter": as_bytes(adapter), **coded}
    if state.size:
        kept["optimizer_state"] = as_bytes(state)
    named: dict[str, Any] = {name: spec.bytes_digest(blob) for name, blob in kept.items()}
    if by.downlink is not None:
        named["trail"] = parent.trail_to(named["delta"])
    return Made(dataclasses.replace(_following(by, parent, shares), **named), tuple(kept.values()))


def _check_finite(values: Vector, parent: ReleaseManifest) -> None:
    if not np.isfinite(values).all():
        number = parent.version + 1
        raise Diverged(f"release {number} would not be finite: training or the server optimizer has diverged")


def _check_codable(owed: Vector, parent: ReleaseManifest) -> None:
    if not max(owed.max(initial=0), -owed.min(initial=0)) <= LARGEST_CODED:
        raise Diverged(
            f"release {parent.version + 1} would be too large a step for any codec: training or the server optimizer has diverged"
        )


def _coded(
    by: Rules, codec: Chain, parent: ReleaseManifest, step: Vector, blobs: Blobs, delta: Stored | None
) -> tuple[Vector, dict[str, Stored]]:
    """The step that arrives when `step`, and what is owed from before, travels coded; the coded delta and what is owed then.

    It comes after the optimizer, whose state therefore sees true means alone: adapter plus residual walk as they would
    uncoded. The codec begins anew each time, so that nothing is owed twice, in its own memory and here.
    """
    assert by.spec.downlink is not None, "where the codec is from"
    decay, residual = np.float32(by.spec.downlink.decay), stored_vector(blobs, parent.residual, by.layout.size)
    owed = step + decay * residual
    _check_codable(owed, parent)
    encoder = by.spec.encoder(codec, parent.version + 1)
    payload = encoder.encode(Delta(by.layout, owed), encoder.init(by.layout))[0] if delta is None else delta
    sent = _sent(codec, payload, by.layout) if delta is None else codec.decode(payload, by.layout).vector
    return sent, {"delta": payload, "residual": as_bytes(owed - sent)}


def _sent(codec: Chain, payload: Stored, layout: Layout) -> Vector:
    """What arrives of a delta coded here: a scale may overflow where no entry does."""
    try:
        return codec.decode(payload, layout).vector
    except PayloadError as error:
        raise Diverged(f"a release's step is too large for its codec: {error}") from error


def _step(by: Rules, parent: ReleaseManifest, shares: tuple[Share, ...], blobs: Blobs) -> Made:
    """A run of scalars alone: nothing is replayed here, whatever the size of the adapter."""
    step = mean_step(by, parent, shares, blobs).to_bytes()
    digest = spec.bytes_digest(step)
    following = _following(by, parent, shares)
    return Made(dataclasses.replace(following, step=digest, trail=parent.trail_to(digest)), (step,))


def _following(by: Rules, parent: ReleaseManifest, shares: tuple[Share, ...]) -> ReleaseManifest:
    return ReleaseManifest(
        run=by.spec.name,
        version=parent.version + 1,
        spec=by.spec.digest,
        layout=by.layout.digest,
        parent=parent.digest,
        adapter=None,
        optimizer_state=None,
        contributions=shares,
    )


def fold(by: Rules, shares: tuple[Share, ...], number: int, adapter: Vector, blobs: Blobs) -> Vector:
    """The mean delta, float32 [layout.size]: one update in memory at a time, unless the aggregator needs them all."""
    total = by.aggregator.start(by.layout, adapter)
    for share in shares:
        payload = stored(blobs, share.digest)
        if not by.added(payload, share.weight, total):
            total.add(*opened(by, share, payload, number))
    return total.mean()


def opened(by: Rules, share: Share, payload: Stored, number: int) -> tuple[Vector, int, Portion | None]:
    """What an update adds to the adapter, float32 [layout.size], what it counts, and the part of the layout that it is of."""
    update = by.read(payload)
    portion = update.portion if isinstance(update, Part) else None
    return by.vector(update, _origin(share, number), share.device), share.weight, portion


def mean_step(by: Rules, parent: ReleaseManifest, shares: tuple[Share, ...], blobs: Blobs) -> Step:
    """The weighted mean of the devices' multiples, in units: exact sums, one rounding, whatever the order."""
    directions = by.along()
    whole, number = sum(share.weight for share in shares), parent.version + 1
    weighted = (_units(by, share, blobs) * share.weight for share in shares)  # one in memory at a time
    if directions.drawn == "device":
        keys = [directions.key(by.spec.seed, _origin(share, number), share.device) for share in shares]
        return Step(tuple((key, _rounded(units, whole)) for key, units in zip(keys, weighted, strict=True)))
    mean = _rounded(_sum(weighted, directions.count), whole)
    if directions.drawn == "pool" and parent.step is not None:
        mean = mean + Step.parse(stored(blobs, parent.step), directions).strands[0][1]
    strand: Strand = (directions.key(by.spec.seed, number, ""), mean)
    return Step((strand,))


def _units(by: Rules, share: Share, blobs: Blobs) -> Units:
    update = by.read(stored(blobs, share.digest))
    assert isinstance(update, Scalars), "a run without a codec reads scalars"
    return update.units


def _sum(parts: Iterable[Units], count: int) -> Units:
    total = np.zeros(count, np.int64)
    for part in parts:
        total += part
    return total


def _rounded(total: Units, by: int) -> Units:
    """total / by to the nearest integer, halves upwards."""
    nearest: Units = (2 * total + by) // (2 * by)
    return nearest


def replayed(by: Rules, initial_adapter: Vector, steps: Sequence[memoryview]) -> Trajectory:
    """Where a run of scalars stands after `steps`, oldest first (of a pool only the newest counts)."""
    state = Trajectory.start(by.along(), by.layout, initial_adapter)
    for data in steps:
        state = state.after(Step.parse(data, by.along()))
    return state


def _previous(by: Rules, parent: ReleaseManifest, blobs: Blobs) -> tuple[Vector, Vector]:
    if parent.adapter is None:
        raise StoreError(f"release {parent.version} of {parent.run!r} names no adapter")
    adapter = stored_vector(blobs, parent.adapter, by.layout.size)
    return adapter, stored_vector(blobs, parent.optimizer_state, by.optimizer.state_size(by.layout.size))


def stored_vector(blobs: Blobs, digest: str | None, size: int) -> Vector:
    """A stored vector, float32 [size]; zeros where a release names none."""
    return np.zeros(size, np.float32) if digest is None else vector(stored(blobs, digest), size)


def stored(blobs: Blobs, digest: str) -> memoryview:
    try:
        return blobs.get(digest)
    except Refused as error:
        if error.reason is not Reason.UNKNOWN_BLOB:
            raise
        raise StoreError(f"a release needs blob {digest[:12]}…, which is gone") from error


def damage(digests: Iterable[str], blobs: Blobs) -> str | None:
    """What is wrong with the first stored blob that is not what its digest says; None for none."""
    for digest in digests:
        try:
            data = blobs.get(digest)
        except StoreError as error:
            return str(error)
        except Refused as error:
            if error.reason is not Reason.UNKNOWN_BLOB:
                raise
            return f"blob {digest[:12]}… is gone"
        if spec.bytes_digest(data) != digest:
            return f"blob {digest[:12]}… is damaged"
    return None


def vector(data: memoryview, size: int) -> Vector:
    """A stored vector, float32 [size] without a copy. Raises StoreError for another length."""
    if len(data) != 4 * size:
        raise StoreError(f"a stored vector has {len(data)} bytes, not {4 * size}")
    return np.frombuffer(data, "<f4")


def as_bytes(values: Vector) -> memoryview:
    """The stored form of a vector: float32, little-endian."""
    return memoryview(values.astype("<f4").data).cast("B")
