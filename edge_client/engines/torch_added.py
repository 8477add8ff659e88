"""What is added to what a frozen layer gives: a tuned bias, or a bottleneck behind it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from edge_client.adapters import Bottleneck


def bias(layer: Any, device: torch.device) -> nn.Parameter:
    """Tune a layer's bias: the parameter is added to it."""
    added = nn.Parameter(torch.zeros(layer.out_features, device=device))
    layer.register_forward_hook(lambda _, given, made: made + added)
    return added


def bottleneck(layer: Any, part: Bottleneck, device: torch.device) -> dict[int, nn.Parameter]:
    """What leaves the layer, y [..., D], becomes y + up · gelu(down · y); the parameters by where they start in the vector."""
    down = nn.Parameter(torch.zeros(part.width, layer.out_features, device=device))
    up = nn.Parameter(torch.zeros(layer.out_features, part.width, device=device))

    def follow(_: Any, given: Any, made: torch.Tensor) -> torch.Tensor:
        return made + functional.gelu(made @ down.T) @ up.T

    layer.register_forward_hook(follow)
    return {part.down.start: down, part.up.start: up}
