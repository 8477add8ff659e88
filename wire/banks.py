"""Banks: several adapters in the layout of one run, of which a device tunes one (IFCA, arXiv 2006.04088)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from wire.delta import Layout
from wire.errors import SpecError

MARK = "bank:"


def spread(layout: Layout, names: Sequence[str]) -> Layout:
    """A copy of an adapter's layout for each of `names`, one after the other. Raises SpecError for more than a layout holds."""
    every = tuple(dataclasses.replace(t, name=f"{MARK}{name}.{t.name}") for name in names for t in layout.tensors)
    try:
        return Layout(every)
    except ValueError as error:
        raise SpecError(f"portions: of {len(names)} banks: {error}") from error


def banks(layout: Layout) -> Mapping[str, tuple[int, ...]]:
    """The places of each bank's tensors, by its name; none for a layout of one adapter."""
    found: dict[str, list[int]] = {}
    for number, tensor in enumerate(layout.tensors):
        name, _, _ = tensor.name.partition(".")
        if name.startswith(MARK):
            found.setdefault(name.removeprefix(MARK), []).append(number)
    return {name: tuple(places) for name, places in found.items()}


def unmarked(layout: Layout) -> Layout:
    """The layout of one bank, under the adapter's own names."""
    return Layout(tuple(dataclasses.replace(t, name=t.name.partition(".")[2]) for t in layout.tensors))
