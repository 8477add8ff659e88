"""The split engine: the torch engine's first and last layers here, the middle ones on a helper (FedBERT, FedSplitX).

A device that cannot compute the middle of a model tunes adapters at its ends. A step moves hidden states of 2 · B · T · D bytes:
two of them where nothing below the middle is tuned, else five.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from edge_client.adapters import Adapter
from edge_client.engines import Tokens
from edge_client.engines.torch_engine import TorchEngine, best_device
from edge_client.middle import Helper, Middle
from quantize import QuantizedBase
from wire.delta import Layout, Vector, layer_number
from wire.errors import SpecError


class SplitEngine(TorchEngine):
    """`middle` is the helper; adapters stand on the layers before and after it alone."""

    cuts = False
    keeps = False

    def __init__(
        self,
        base: QuantizedBase,
        adapter: Adapter,
        layout: Layout,
        max_memory: int | None,
        device: torch.device,
        middle: Middle,
    ) -> None:
        super().__init__(base, adapter, layout, max_memory, device)
        if adapter.placement(base).prefix is not None:
            raise SpecError("a prefix reaches into every layer, the helper's too: tune a prompt, or without a helper")
        _check_ends(layout, middle)
        self.middle, layers = middle, list(self._body.layers)
        remote = _Remote(middle)
        self._body.layers = nn.ModuleList([*layers[: middle.first], remote, *layers[middle.last :]])

    @classmethod
    def load(
        cls,
        base: QuantizedBase,
        adapter: Adapter,
        layout: Layout,
        max_memory: int | None = None,
        threads: int | None = None,
        helper: Helper | None = None,
    ) -> SplitEngine:
        """Raises SpecError without a helper, and for an adapter that stands on the helper's layers; RemoteError."""
        if helper is None:
            raise SpecError("--engine split needs --middle HOST:PORT, where `edgetune middle` listens")
        if threads:
            torch.set_num_threads(threads)
        return cls(base, adapter, layout, max_memory, best_device(), Middle(helper, base.identity))

    def features(self, sequences: Sequence[Tokens]) -> Vector:
        raise SpecError(
            "what the helper's layers make of a text stays there: a run with a [selection] needs --engine torch"
        )

    def generate(self, prompt: str, max_new_tokens: int, temperature: float, seed: int, raw: bool) -> str:
        raise SpecError("the split engine has no cache for words to come: generate with --engine torch")

    @property
    def traffic(self) -> dict[str, int]:
        """Calls to the helper so far, and bytes of hidden states to it and from it."""
        return {"calls": self.middle.calls, "sent": self.middle.sent, "received": self.middle.received}


def _check_ends(layout: Layout, middle: Middle) -> None:
    """Raises SpecError."""
    for tensor in layout.tensors:
        layer = layer_number(tensor.name)
        if layer is not None and middle.first <= layer < middle.last:
            raise SpecError(
                f"the helper computes layers {middle.first} to {middle.last - 1}, and the run tunes layer {layer}: give its"
                " adapter fewer `layers`, or the helper others"
            )


class _Remote(nn.Module):
    """Stands where the middle layers would, as one layer."""

    attention_type = "full_attention"

    def __init__(self, middle: Middle) -> None:
        super().__init__()
        self._middle = middle
        self.compute_dtype = torch.bfloat16

    def forward(self, hidden: torch.Tensor, **_: Any) -> torch.Tensor:
        made: torch.Tensor = _Through.apply(hidden, self._middle, self.compute_dtype == torch.float32)
        return made


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, middle: Middle, exact: bool) -> torch.Tensor:
        ctx.middle = middle
        ctx.save_for_backward(hidden)
        return _tensor(middle.forward(_array(hidden), exact), hidden)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (hidden,) = ctx.saved_tensors
        return _tensor(ctx.middle.backward(_array(hidden), _array(grads[0])), hidden), None, None


def _array(values: torch.Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    found: np.ndarray[Any, np.dtype[np.float32]] = values.detach().float().cpu().numpy()
    return found


def _tensor(values: np.ndarray[Any, np.dtype[np.float32]], like: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(values).to(like.device, like.dtype)
