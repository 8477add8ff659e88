"""What a split-learning helper computes: some layers of a frozen base, forward and backward, with nothing kept in between."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch
from torch import nn

from edge_client.engines import torch_model
from edge_client.engines.torch_engine import best_device
from edge_client.engines.torch_linear import compute_in
from quantize import QuantizedBase
from wire.delta import Vector
from wire.errors import UserError


class MiddleLayers:
    """Layers `first` up to, and without, `last` of a base. One computation at a time. Raises UserError for layers that the
    base does not have, or for all of them."""

    def __init__(self, base: QuantizedBase, first: int, last: int) -> None:
        model = torch_model.frozen(base, best_device())
        self._body = model.model
        every = len(self._body.layers)
        if not 0 <= first < last <= every or last - first == every:
            raise UserError(
                f"--layers {first}:{last}: the base has layers 0 to {every - 1}, and devices need some of them"
            )
        self.base, self.first, self.last = base.identity, first, last
        self.width = int(model.config.hidden_size)
        self._body.layers = nn.ModuleList(self._body.layers[first:last])
        self._body.norm = nn.Identity()
        self._lock = threading.Lock()

    def forward(self, hidden: Vector, exact: bool) -> Vector:
        """What leaves the last layer for what enters the first, float32 [B, T, D] both."""
        with self._lock, torch.no_grad():
            return _array(self._run(torch.from_numpy(hidden), exact))

    def backward(self, hidden: Vector, by_left: Vector) -> Vector:
        """The loss's derivative by what enters, from that by what leaves; float32 [B, T, D] all."""
        with self._lock:
            entered = torch.from_numpy(hidden).requires_grad_()
            left = self._run(entered, exact=False)
            left.backward(torch.from_numpy(by_left).to(left.device))
            assert entered.grad is not None, "what leaves follows from what enters"
            return _array(entered.grad)

    def _run(self, hidden: torch.Tensor, exact: bool) -> torch.Tensor:
        compute_in(self._body, torch.float32 if exact else torch.bfloat16)
        device = next(self._body.parameters()).device
        made: torch.Tensor = self._body(inputs_embeds=hidden.to(device), use_cache=False).last_hidden_state
        return made


def _array(values: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    found: np.ndarray[Any, np.dtype[np.float32]] = values.detach().float().cpu().numpy()
    return found
