"""A Hugging Face causal model over a quantized base: built without weights, filled from the mapped file, LoRA by peft."""

from __future__ import annotations

import logging
import warnings
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from edge_client.adapters import LowRank, Placement
from edge_client.engines import torch_added
from edge_client.engines.torch_front import Front, PrefixFront, front
from edge_client.engines.torch_linear import Float32Embedding, linear, tensor
from quantize import QuantizedBase
from wire.delta import Layout, Vector
from wire.errors import BaseModelError


def build(
    base: QuantizedBase, placement: Placement, layout: Layout, device: torch.device
) -> tuple[Any, list[Any], Front]:
    """A model with float32 adapters on a frozen quantized base, the tuned parameters in the layout's order, and what comes before
    a text.

    LoRA factors are peft's own layers; a core and a gain enter as parametrizations of them and of the norms, biases,
    bottlenecks and entries as hooks of the layers. No float copy of the base is made.
    """
    model = frozen(base, device)
    before, found = front(model, placement, device)
    tuned: dict[int, Any] = {**found}
    for module, place in placement.gains.items():
        tuned[place.start] = _gain(model.get_submodule(module), device)
    for module, place in placement.biases.items():
        tuned[place.start] = torch_added.bias(model.get_submodule(module), device)
    for module, bottleneck in placement.bottlenecks.items():
        tuned |= torch_added.bottleneck(model.get_submodule(module), bottleneck, device)
    for module, some in placement.entries.items():
        tuned[some.place.start] = torch_added.entries(model.get_submodule(module), some, device)
    if placement.linears:
        model = _with_lora(model, placement)
        for module, terms in placement.linears.items():
            for number, term in enumerate(terms):
                tuned |= _low_rank(model.base_model.model.get_submodule(module), _term(number), term, device)
    return model, [tuned[place.start] for _, place in layout.slices()], before


def prefix_of(base: QuantizedBase, placement: Placement, layout: Layout, vector: Vector) -> Vector:
    """Keys and values of a prefix, float32 [length, layers · 2 · kv]: each layer's keys, then its values."""
    _, factors, before = build(base, placement, layout, torch.device("cpu"))
    assert isinstance(before, PrefixFront), "asked of a placement with a prefix"
    with torch.no_grad():
        for factor, (tensor_, place) in zip(factors, layout.slices(), strict=True):
            factor.copy_(torch.tensor(vector[place]).view(tensor_.shape))
        rows: Vector = before.rows().numpy()
    return rows


def frozen(base: QuantizedBase, device: torch.device) -> Any:
    """The model of a base, nothing of it tuned. On the CPU its weights are the base's file, read as they are used."""
    _quiet()
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base.folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _fill(model, base, device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


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


def _with_lora(model: Any, placement: Placement) -> Any:
    """peft's model with an adapter for each number of a term, all of them active."""
    import peft

    numbers = range(max(map(len, placement.linears.values())))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks for a name that transformers renamed
        made = peft.get_peft_model(model, _config(placement, 0), adapter_name=_term(0))
        for number in numbers[1:]:
            made.add_adapter(_term(number), _config(placement, number))
    made.base_model.set_adapter([_term(number) for number in numbers])
    return made


def _term(number: int) -> str:
    """What peft calls the adapter of a term."""
    return f"term_{number}" if number else "default"


def _config(placement: Placement, number: int) -> Any:
    import peft

    having = {module: terms[number] for module, terms in placement.linears.items() if len(terms) > number}
    term = next(iter(having.values()))
    return peft.LoraConfig(
        r=term.rank,
        lora_alpha=term.scale * term.rank,  # type: ignore[arg-type]  # peft takes any number
        target_modules=list(having),
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
    )


def _low_rank(layer: Any, name: str, part: LowRank, device: torch.device) -> dict[int, Any]:
    """Fill peft's factors of one term of a layer; the tuned ones by where they start in the flat vector."""
    a, b = layer.lora_A[name], layer.lora_B[name]
    tuned = {}
    for factor, place in ((a, part.a), (b, part.b)):
        if isinstance(place, slice):
            tuned[place.start] = factor.weight
        else:
            factor.weight = nn.Parameter(tensor(place, device), requires_grad=False)
    if part.core is not None:
        fixed = a.weight.detach()
        a.weight = nn.Parameter(torch.zeros(len(fixed), len(fixed), device=device))
        parametrize.register_parametrization(a, "weight", _Core(fixed), unsafe=True)
        tuned[part.core.start] = a.parametrizations.weight.original
    return tuned


class _Core(nn.Module):
    """A core R [rank, rank] becomes the factor R A."""

    def __init__(self, fixed: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("fixed", fixed, persistent=False)

    def forward(self, core: torch.Tensor) -> torch.Tensor:
        fixed: Any = self.fixed
        made: torch.Tensor = core @ fixed
        return made


def _gain(norm: Any, device: torch.device) -> Any:
    """Tune a norm: its gain g becomes g · (1 + tuned)."""
    fixed = norm.weight.detach()
    norm.weight = nn.Parameter(torch.zeros_like(fixed))
    parametrize.register_parametrization(norm, "weight", _Gain(fixed))
    return norm.parametrizations.weight.original


class _Gain(nn.Module):
    def __init__(self, fixed: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("fixed", fixed, persistent=False)

    def forward(self, tuned: torch.Tensor) -> torch.Tensor:
        fixed: Any = self.fixed
        made: torch.Tensor = fixed * (1 + tuned)
        return made


def _quiet() -> None:
    """Import notes of the libraries that concern nobody here: optional kernels that are not needed."""
    for name in ("bitsandbytes", "transformers", "peft"):
        logging.getLogger(name).setLevel(logging.ERROR)
