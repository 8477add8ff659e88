"""A Hugging Face causal model over a quantized base: built without weights, filled from the mapped file, LoRA by peft."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import nn

from edge_client.engines import Adapter
from edge_client.engines.torch_linear import Float32Embedding, linear, tensor
from quantize import QuantizedBase
from wire.errors import BaseModelError


def build(base: QuantizedBase, adapter: Adapter, device: torch.device) -> Any:
    """A peft model with float32 LoRA factors on a frozen quantized base. No float copy of the base is made."""
    _quiet()
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base.folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _fill(model, base, device)
    return _with_lora(model, adapter)


def _fill(model: Any, base: QuantizedBase, device: torch.device) -> None:
    layers = base.linears()
    for module in layers:
        _put(model, module, linear(base, module, device))
    inside = {f"{module}.{part}" for module in layers for part in ("weight", "bias")}
    for name in base.names():
        if name not in inside:
            owner, leaf = _owner(model, name)
            value = base.parts(name)[""] if base.scheme(name) == "bf16" else base.dequantized(name)
            held = tensor(value, device)
            held = held.view(torch.bfloat16) if base.scheme(name) == "bf16" else held
            setattr(owner, leaf, nn.Parameter(held, requires_grad=False))
    Float32Embedding.of(model.get_input_embeddings())
    model.tie_weights()
    for name, module in list(model.named_modules()):
        if name.rsplit(".", 1)[-1] == "rotary_emb":  # its frequencies are computed, not stored: compute them for real
            _put(model, name, type(module)(config=model.config).to(device))
    if absent := [name for name, value in [*model.named_parameters(), *model.named_buffers()] if value.is_meta]:
        raise BaseModelError(f"base {base.identity[:12]}… has no tensor {absent[0]!r} that its architecture needs")


def _owner(model: Any, name: str) -> tuple[Any, str]:
    path, leaf = name.rsplit(".", 1)
    try:
        return model.get_submodule(path), leaf
    except AttributeError as error:
        raise BaseModelError(f"the base's tensor {name!r} has no place in its architecture") from error


def _put(model: Any, name: str, module: nn.Module) -> None:
    owner, leaf = _owner(model, name)
    setattr(owner, leaf, module)


def _with_lora(model: Any, adapter: Adapter) -> Any:
    import peft

    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # peft takes any number
        target_modules=list(adapter.targets),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for a name that transformers renamed
        return peft.get_peft_model(model, config)


def _quiet() -> None:
    """Import notes of the libraries that concern nobody here: optional kernels that are not needed."""
    for name in ("bitsandbytes", "transformers", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
