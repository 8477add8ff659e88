"""How much of the shared pair and how much of its own a device computes with: two weights found by losses alone, as in FDLoRA
(arXiv 2406.07925). Training goes on from both as they are; the weights are for measuring, answering and taking home."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_client.engines import Engine, Tokens
from edge_client.view import View
from wire.delta import Vector

Weights = tuple[float, float]
"""Of the shared pair and of the device's own."""
PLAIN: Weights = (1.0, 1.0)
STEPS = (0.5, 0.25, 0.125)
"""How far to look around the best so far; each four evaluations, and four more where one is better."""
MOST_MOVES = 3
"""At each of them."""


def has_both(view: View) -> bool:
    """Whether the device has a pair of its own beside a shared one: of a lone B there is nothing to weigh."""
    return view.personal is not None and any(tensor.role == "lora_A" for tensor in view.personal.tensors)


def fused(view: View, adapter: Vector, weights: Weights) -> Vector:
    """`adapter`, float32 [view.layout.size], with what either pair does times its weight."""
    if weights == PLAIN or not has_both(view):
        return adapter
    made, shared = adapter.copy(), len(view.shared.tensors)
    for number, (tensor, place) in enumerate(view.layout.slices()):
        if tensor.role == "lora_B":
            made[place] *= np.float32(weights[number >= shared])
    return made


def best_weights(engine: Engine, view: View, adapter: Vector, batch: Sequence[Tokens], first: Weights) -> Weights:
    """The weights of the least loss on `batch`, by a compass search from `first` or from 1 and 1, whichever is better.

    The engine's adapter afterwards is unspecified.
    """
    if not has_both(view):
        return PLAIN

    def losses(tried: Sequence[Weights]) -> list[float]:
        return [float(loss) for loss in engine.losses(batch, [fused(view, adapter, weights) for weights in tried])]

    best, least = _least([first, PLAIN], losses([first, PLAIN]))
    for step in STEPS:
        for _ in range(MOST_MOVES):
            tried = [(max(0.0, best[0] + x), max(0.0, best[1] + y)) for x, y in _around(step)]
            found, loss = _least(tried, losses(tried))
            if not loss < least:
                break
            best, least = found, loss
    return best


def _around(step: float) -> list[Weights]:
    return [(step, 0.0), (-step, 0.0), (0.0, step), (0.0, -step)]


def _least(tried: Sequence[Weights], losses: Sequence[float]) -> tuple[Weights, float]:
    number = int(np.argmin(losses))
    return tried[number], losses[number]
