"""Untrusted bytes become an update or a PayloadError. Pure: time and memory are bounded by the declared layout."""

from __future__ import annotations

import numpy as np

from coordinator.publish import vector
from coordinator.rules import Rules
from wire import spec
from wire.delta import Layout
from wire.errors import PayloadError, Reason
from wire.messages import Contribution
from wire.run_spec import RunSpec


def declared(contribution: Contribution, by: Rules) -> None:
    """The size a device declares, before a byte of the payload is looked at. Raises PayloadError."""
    limit = by.max_bytes()
    if contribution.size > limit:
        raise PayloadError(
            Reason.TOO_LARGE, f"payload of {contribution.size} bytes; this run's updates have at most {limit}"
        )


def examine(contribution: Contribution, payload: bytes | memoryview, by: Rules, digest: str | None = None) -> None:
    """Size and digest as declared, decodes under this run's codec and layout, finite, in range. Raises PayloadError.

    `digest`: the payload's SHA-256, from a caller who has just computed it."""
    declared(contribution, by)
    if len(payload) != contribution.size:
        raise PayloadError(Reason.BAD_SIZE, f"{len(payload)} bytes arrived, {contribution.size} were declared")
    if (digest or spec.bytes_digest(payload)) != contribution.digest:
        raise PayloadError(Reason.BAD_DIGEST, "the payload does not have the declared SHA-256")
    update = by.read(payload)
    if by.codec is not None:
        by.check(update, contribution.round, contribution.device)


def examine_adapter(data: memoryview, run: RunSpec, layout: Layout) -> None:
    """An initial adapter: one finite float32 for each entry of the layout. Raises PayloadError."""
    if not run.base.digest:
        raise PayloadError(Reason.BAD_REQUEST, "the spec names no base digest")
    if len(data) != 4 * layout.size:
        raise PayloadError(Reason.BAD_SIZE, f"an adapter of this layout has {4 * layout.size} bytes, not {len(data)}")
    if not np.isfinite(vector(data, layout.size)).all():
        raise PayloadError(Reason.NOT_FINITE, "the initial adapter has entries that are not finite")
