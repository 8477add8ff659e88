"""What a device computes with of a run: the release as it sees it, with what is its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from edge_client.adapters import Adapter, Base
from edge_client.banks import of_domain
from edge_client.fusion import fused
from edge_client.session import view_of
from edge_client.state import DeviceState, tuned_rank
from edge_client.view import full_rank
from wire.delta import Layout, Vector
from wire.errors import UserError
from wire.run_spec import RunSpec
from wire.scalars import Trajectory


@dataclasses.dataclass(frozen=True, eq=False)
class Taken:
    """`vector`, float32 [layout.size], of the adapter `row`."""

    row: Adapter
    layout: Layout
    vector: Vector


def taken(
    run: RunSpec,
    row: Adapter,
    base: Base,
    release: Trajectory,
    folder: Path,
    rank: int | None = None,
    domain: str | None = None,
) -> Taken:
    """A release for a device whose state is in `folder`, at `rank` (None: that of its last part in the run); the state is
    locked only where a run leaves devices something of their own. Of a run of banks, that of `domain`.

    Raises UserError where this device has nothing of its own yet, for a bank that there is not and for a rank beyond the run's.
    """
    view = of_domain(run, view_of(run, row, base, tuned_rank(folder, run) if rank is None else rank), domain)
    if rank is not None and rank > (full := full_rank(view.shared)):
        raise UserError(
            f"--rank {rank}: run {run.name!r} has rank {full}; leave --rank out for what this device tuned at"
        )
    row = row if view.rank is None else row.narrowed(view.rank)
    if view.personal is None:
        return Taken(row, view.layout, view.enter(release, release.adapter[:0]).adapter)
    state = DeviceState(folder)
    try:
        first = view.own(row.initial(view.layout, run.seed, base))
        own, weights = state.own(run, first), state.weights(run)
    finally:
        state.close()
    if own is first:
        raise UserError(
            f"run {run.name!r} is personal, and this device has no part of its own in it yet, or one of another --rank;"
            " `edgetune client join` makes one"
        )
    return Taken(row, view.layout, fused(view, view.enter(release, own).adapter, weights))


def shared_alone(row: Adapter, base: Base) -> Adapter:
    """The adapter of what all devices share. Raises UserError where that alone is no model."""
    if row.personal(base) is None:
        return row
    alone: Adapter = dataclasses.replace(row, keeps=None)  # type: ignore[type-var]  # rows are dataclasses
    if alone.layout(base).digest != row.layout(base).digest:
        raise UserError(
            "this run's devices share one factor and keep the other: there is no model that all of them have;"
            " `edgetune client export` writes a device's own"
        )
    return alone
