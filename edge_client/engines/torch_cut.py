"""A torch model in two parts: the layers below a cut, run without a graph, and those above it."""

from __future__ import annotations

from typing import Any

import torch

from edge_client.engines.cuts import Cut


class _Reached(Exception):
    """The cut: nothing above it is to be computed."""


def entering(body: Any, cut: Cut, given: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """What enters the first layer above when the body is `given` that: hidden states [B, T, D], and what layers take beside
    them."""
    found: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def stop(layer: Any, args: tuple[Any, ...], settings: dict[str, Any]) -> None:
        found.append((args[0], settings))
        raise _Reached

    hook = body.layers[cut.layer].register_forward_pre_hook(stop, with_kwargs=True)
    try:
        body(**given, use_cache=False)
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
