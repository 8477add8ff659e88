"""What is added to what a frozen layer gives: a tuned bias, a bottleneck behind it, or some entries of its weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional

from edge_client.adapters import Bottleneck, Entries


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


def entries(layer: Any, part: Entries, device: torch.device) -> nn.Parameter:
    """What is added to the weight's entries at `part.positions`."""
    positions = torch.as_tensor(part.positions, device=device)
    added = nn.Parameter(torch.zeros(len(positions), device=device))
    shape = (layer.out_features, layer.in_features)

    def follow(_: Any, given: tuple[torch.Tensor, ...], made: torch.Tensor) -> torch.Tensor:
        more: torch.Tensor = _Entries.apply(given[0].float(), added, positions, shape)
        return made + more.to(made.dtype)

    layer.register_forward_hook(follow)
    return added


class _Entries(torch.autograd.Function):
    """x [..., in] times a sparse weight, made dense for the product alone: nothing of its size waits for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, given: torch.Tensor, added: torch.Tensor, positions: torch.Tensor, shape: tuple[int, int]
    ) -> torch.Tensor:
        ctx.save_for_backward(given, added, positions)
        ctx.shape = shape
        return given @ _dense(added, positions, shape).T

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        given, added, positions = ctx.saved_tensors
        rows, columns = grads[0].flatten(0, -2), given.flatten(0, -2)
        return grads[0] @ _dense(added, positions, ctx.shape), (rows.T @ columns).reshape(-1)[positions], None, None


def _dense(added: torch.Tensor, positions: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    weight = torch.zeros(shape[0] * shape[1], device=added.device)
    weight[positions] = added
    return weight.view(shape)
