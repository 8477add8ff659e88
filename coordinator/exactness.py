"""How exact a round's aggregate is: a meter for runs of low-rank factors, computed again from stored updates."""

from __future__ import annotations

from collections.abc import Iterable

from coordinator.aggregators import products
from coordinator.aggregators.products import Update
from coordinator.publish import fold, opened, shares_of, stored, stored_vector
from coordinator.rules import MOST_HELD, Rules
from coordinator.stores import Blobs
from wire.messages import Contribution, ReleaseManifest


def aggregation_error(
    by: Rules, parent: ReleaseManifest, accepted: Iterable[Contribution], blobs: Blobs
) -> float | None:
    """How far what the aggregator makes of a round is from the mean of what the devices' models do, relative to what that
    mean changes, before the server optimizer and the downlink.

    None where there are no products (`products.aggregation_error`), where the updates of a buffer start from several
    releases, and where they take more memory than MOST_HELD. Raises StoreError for a blob that is missing or damaged.
    """
    shares, number = shares_of(by, accepted, blobs), parent.version + 1
    size = by.layout.size
    if by.codec is None or by.spec.cohort.mode == "async" or not 0 < len(shares) * 4 * size <= MOST_HELD:
        return None
    start = stored_vector(blobs, parent.adapter, size)
    updates = [Update(*opened(by, share, stored(blobs, share.digest), number)) for share in shares]
    return products.aggregation_error(by.layout, start, start + fold(by, shares, number, start, blobs), updates)
