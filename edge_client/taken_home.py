"""Loads the model in this file's folder: a base and the bottleneck adapters behind its layers. Copied there by the export;
it needs torch, transformers and safetensors, and nothing of edgetune.

    python -c "import load; model = load.model()"
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import transformers
from torch.nn import functional


def model(folder: Path = Path(__file__).parent) -> Any:
    """A causal model of transformers, in float32."""
    found: Any = transformers.AutoModelForCausalLM.from_pretrained(folder / "base")
    tensors = safetensors.torch.load_file(folder / "adapter.safetensors")
    for name in tensors:
        if name.endswith(".down.weight"):
            module = name.removesuffix(".down.weight")
            found.get_submodule(module).register_forward_hook(_following(tensors[name], tensors[f"{module}.up.weight"]))
    return found


def _following(down: torch.Tensor, up: torch.Tensor) -> Any:
    """y becomes y + up · gelu(down · y)."""

    def follow(layer: Any, given: Any, made: torch.Tensor) -> torch.Tensor:
        return made + functional.gelu(made @ down.T.to(made)) @ up.T.to(made)

    return follow
