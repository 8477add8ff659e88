"""Sealed contributions to a release, as a pure function of stored bytes: anybody may compute it again.

`combine` is used twice: by a coordinator that closes a round, and by `edgetune run verify` that checks one.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from coordinator.aggregators import AGGREGATORS, SERVER_OPTIMIZERS, Aggregator, ServerOptimizer
from coordinator.stores import Blobs
from wire import spec
from wire.codecs.chain import Chain
from wire.delta import Layout, Vector
from wire.errors import Refused, StoreError
from wire.messages import Contribution, ReleaseManifest, Share
from wire.run_spec import RunSpec


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a run's spec says of combining, built once."""

    spec: RunSpec
    layout: Layout
    codec: Chain
    aggregator: Aggregator
    optimizer: ServerOptimizer


def rules(run: RunSpec, layout: Layout) -> Rules:
    """Raises SpecError for a codec, aggregator or server optimizer that is not in its table."""
    aggregator = spec.build(AGGREGATORS, run.aggregator, "aggregator")
    optimizer = spec.build(SERVER_OPTIMIZERS, run.server_optimizer, "server_optimizer")
    return Rules(run, layout, run.chain(), aggregator, optimizer)


def initial(run: RunSpec, layout: Layout, adapter_digest: str) -> ReleaseManifest:
    """Release 0: what the run was created with."""
    return ReleaseManifest(run.name, 0, run.digest, layout.digest, None, adapter_digest, None, ())


def combine(
    by: Rules, parent: ReleaseManifest, accepted: list[Contribution], blobs: Blobs
) -> tuple[ReleaseManifest, Vector, Vector]:
    """The next release with its adapter and optimizer state (float32; the state may be empty).

    `accepted` may come in any order. Raises StoreError for a blob that is missing or damaged.
    """
    ordered = sorted(accepted, key=lambda c: c.device)
    shares = tuple(Share(c.device, c.digest, by.aggregator.weight(c)) for c in ordered)
    adapter, state = _previous(by, parent, blobs)
    adapter, state = by.optimizer.apply(adapter, fold(by, shares, blobs), state)
    release = ReleaseManifest(
        run=by.spec.name,
        version=parent.version + 1,
        spec=by.spec.digest,
        layout=by.layout.digest,
        parent=parent.digest,
        adapter=spec.bytes_digest(as_bytes(adapter)),
        optimizer_state=spec.bytes_digest(as_bytes(state)) if state.size else None,
        contributions=shares,
    )
    return release, adapter, state


def fold(by: Rules, shares: tuple[Share, ...], blobs: Blobs) -> Vector:
    """The mean delta, float32 [layout.size]: one update in memory at a time."""
    total = by.aggregator.start(by.layout.size)
    for share in shares:
        total.add(by.codec.decode(_stored(blobs, share.digest), by.layout).vector, share.weight)
    return total.mean()


def _previous(by: Rules, parent: ReleaseManifest, blobs: Blobs) -> tuple[Vector, Vector]:
    adapter = vector(_stored(blobs, parent.adapter), by.layout.size)
    size = by.optimizer.state_size(by.layout.size)
    if parent.optimizer_state is None:
        return adapter, np.zeros(size, np.float32)
    return adapter, vector(_stored(blobs, parent.optimizer_state), size)


def _stored(blobs: Blobs, digest: str) -> memoryview:
    try:
        return blobs.get(digest)
    except Refused as error:
        raise StoreError(f"a release needs blob {digest[:12]}…, which is gone") from error


def vector(data: memoryview, size: int) -> Vector:
    """A stored vector, float32 [size] without a copy. Raises StoreError for another length."""
    if len(data) != 4 * size:
        raise StoreError(f"a stored vector has {len(data)} bytes, not {4 * size}")
    return np.frombuffer(data, "<f4")


def as_bytes(values: Vector) -> memoryview:
    """The stored form of a vector: float32, little-endian."""
    return memoryview(values.astype("<f4").data).cast("B")
