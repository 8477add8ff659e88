"""Next-token loss at label positions only, a few rows at a time: the logits of a whole batch never exist."""

from __future__ import annotations

from typing import Any

import torch

ROWS = 128
"""Rows of logits in memory at once: 25 MB of float32 at a vocabulary of 49,152."""


class RowLoss(torch.autograd.Function):
    """Summed negative log-likelihood of `wanted` int64 [N] under `hidden` [N, D] and a frozen `head` [V, D].

    The head has no gradient, so the gradient of `hidden` is finished while the logits are at hand.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        gradient = torch.empty_like(hidden)
        for at in range(0, len(wanted), ROWS):
            rows = slice(at, at + ROWS)
            logits = (hidden[rows].to(head.dtype) @ head.T).float()
            total += _nll(logits, wanted[rows])
            chance = logits.softmax(-1)
            chance[torch.arange(len(chance), device=chance.device), wanted[rows]] -= 1
            gradient[rows] = (chance.to(head.dtype) @ head).to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return total.float()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.device, gradient.dtype), None, None


def summed(hidden: torch.Tensor, head: torch.Tensor, wanted: torch.Tensor) -> float:
    """The same sum without a gradient, in float32 throughout."""
    head = head.float()
    parts = [
        _nll(hidden[at : at + ROWS].float() @ head.T, wanted[at : at + ROWS]) for at in range(0, len(wanted), ROWS)
    ]
    return float(sum(parts))


def _nll(logits: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    chosen = logits.gather(1, wanted[:, None])[:, 0]
    return (logits.logsumexp(-1) - chosen).double().sum().cpu()
