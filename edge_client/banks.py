"""The adapters of a run that has several, and the one of them that fits a device's text (IFCA, arXiv 2006.04088)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_client.adapters import Adapter, Base
from edge_client.engines import Engine, Tokens
from edge_client.view import View
from wire.banks import banks, spread
from wire.delta import Layout, Vector
from wire.errors import UserError
from wire.portion_rules import chance, rule_of
from wire.run_spec import RunSpec
from wire.scalars import Trajectory


def names_of(run: RunSpec) -> tuple[str, ...]:
    """The run's banks; none where it has one adapter."""
    rule = rule_of(run)
    return rule.names if rule else ()


def layout_of(run: RunSpec, adapter: Adapter, base: Base) -> Layout:
    """What the devices of a run share: an adapter, or one for each bank."""
    names, one = names_of(run), adapter.layout(base)
    return spread(one, names) if names else one


def initial_of(run: RunSpec, adapter: Adapter, base: Base) -> Vector:
    """The start of `layout_of`, float32. Banks compute as the base at first, and have seeds of their own."""
    names, one = names_of(run), adapter.layout(base)
    return np.concatenate([adapter.initial(one, run.seed + n, base) for n in range(len(names) or 1)])


def named(run: RunSpec, view: View, domain: str) -> View:
    """The view of the bank that a person names. Raises UserError for one that the run has not."""
    found = banks(view.shared)
    if domain not in found:
        has = f"the banks {', '.join(found)}" if found else "one adapter for all"
        raise UserError(f"--domain: run {run.name!r} has no {domain!r}: it has {has}")
    return view.of(found[domain])


def of_domain(run: RunSpec, view: View, domain: str | None) -> View:
    """The view to take home. Raises UserError where nobody says which of several."""
    if domain is None and view.bank is not None:
        raise UserError(f"run {run.name!r} has the banks {', '.join(banks(view.shared))}: name one as --domain")
    return view if domain is None else named(run, view, domain)


def fitting(view: View, key: str, engine: Engine, release: Trajectory, batch: Sequence[Tokens]) -> View:
    """The view of the bank of the least loss on `batch`; of equal ones, as all are at first, one by `key`.

    A bank that nobody begins with stays as the base, and banks that begin with the same mixture of texts may stay so: with few
    devices another seed helps, or people who name domains. The engine's adapter afterwards is unspecified.
    """
    views = [view.of(places) for places in banks(view.shared).values()]
    if not views:
        return view
    first = chance(key) % len(views)
    turned = views[first:] + views[:first]
    losses = engine.losses(batch, [one.enter(release, release.adapter[:0]).adapter for one in turned])
    return turned[int(np.argmin(losses))]
