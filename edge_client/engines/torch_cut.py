"""A torch model in two parts: the layers below a cut, run without a graph, and those above it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from edge_client.adapters.low_rank import layer_number
from wire.delta import Layout
from wire.errors import SpecError


@dataclasses.dataclass(frozen=True)
class Cut:
    """`layer`: the first one above. `tensors`: how many of the layout's lie below."""

    layer: int
    tensors: int


WHOLE = Cut(0, 0)


def at(layout: Layout, layer: int, layers: int) -> Cut:
    """The cut before `layer`. Without a tensor below there is nothing to cut off; a tensor outside of layers is above.

    Raises SpecError if the layout's order is not the layers'.
    """
    numbers = [layer_number(tensor.name) for tensor in layout.tensors]
    lies_above = [number is None or number >= layer for number in numbers]
    below = lies_above.index(True) if any(lies_above) else len(lies_above)
    if not all(lies_above[below:]):
        raise SpecError("hybrid: this adapter's tensors do not lie in the layers' order")
    if below == len(lies_above):
        raise SpecError(f"hybrid: this adapter tunes nothing in the last {layers - layer} layers")
    return Cut(layer, below) if below else WHOLE


class _Reached(Exception):
    """The cut: nothing above it is to be computed."""


def entering(body: Any, cut: Cut, ids: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """What enters the first layer above for `ids` [B, T]: hidden states [B, T, D], and what layers are given beside them."""
    found: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def stop(layer: Any, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
        found.append((args[0], settings))
        raise _Reached

    hook = body.layers[cut.layer].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        body(input_ids=ids, use_cache=False)
    except _Reached:
        pass
    finally:
        hook.remove()
    return found[0]


def above(body: Any, cut: Cut, hidden: torch.Tensor, settings: dict[str, Any]) -> torch.Tensor:
    """The last hidden states [B, T, D] from what `entering` gave."""
    for layer in body.layers[cut.layer :]:
        made = layer(hidden, **settings)
        hidden = made[0] if isinstance(made, tuple) else made
    normed: torch.Tensor = body.norm(hidden)
    return normed
