"""Layers that a device chooses by the gradients of its own text, where a run's portions let it (as RaFFM, arXiv 2310.00247)."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence

import numpy as np

from edge_client.engines import GradEngine, Optimizer, Tokens
from edge_client.view import View
from wire.delta import Layout, Vector, layer_number
from wire.portions import Portion

STEEPEST = Optimizer(id="sgd")
"""A step of rate 1 moves by the gradient, at most by 1: what there is to compare."""


def chosen(
    view: View, most: Portion | None, engine: GradEngine, adapter: Vector, batch: Sequence[Tokens]
) -> Portion | None:
    """What the device sends of `most`: where the run leaves it the choice, the layers of the largest gradient of `batch` at
    `adapter`. The engine's adapter afterwards is unspecified."""
    if most is None or view.rule is None or view.rule.choose is None:
        return most
    engine.write(adapter)
    engine.start(STEEPEST, view.tuned(most))
    engine.step(batch, 1.0)
    return steepest(view.layout, most, engine.read() - adapter, view.rule.choose)


def steepest(layout: Layout, most: Portion, gradient: Vector, count: int) -> Portion:
    """The `count` layers of `most` in which `gradient`, float32 [layout.size], is longest; the lower of equals."""
    places = [place for _, place in layout.slices()]
    layers = {number: layer_number(layout.tensors[number].name) for number in most.chosen}
    energy: dict[int | None, float] = collections.defaultdict(float)
    for number, layer in layers.items():
        energy[layer] += float(np.square(gradient[places[number]], dtype=np.float64).sum())
    kept = sorted(energy, key=lambda layer: -energy[layer])[:count]
    return dataclasses.replace(most, chosen=tuple(number for number in most.chosen if layers[number] in kept))
