"""A release taken home: a peft adapter folder beside its base, one merged Hugging Face model, or a folder with a loader of its
own. Needs no torch."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edge_client import starts
from edge_client.adapters import Base, LowRank, Placement
from quantize import QuantizedBase, tensors
from wire.delta import Layout, Vector
from wire.errors import MachineError, UserError

README = """\
# An adapter tuned with edgetune

    import peft, transformers
    base = transformers.AutoModelForCausalLM.from_pretrained("{folder}/base")
    model = peft.PeftModel.from_pretrained(base, "{folder}")

`base/` holds the weights that the devices computed with, as float32: the quantized base made plain, not the original.
"""
SIDE_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def to_peft(base: Base, placement: Placement, layout: Layout, vector: Vector, out: Path) -> None:
    """A folder that `peft.PeftModel.from_pretrained` loads, its base in `base/`: LoRA, a soft prompt or a prefix. Raises
    UserError if `out` exists, or for an adapter that peft does not know."""
    found = _exportable(base)
    held, config = _of_peft(found, placement, layout, vector)
    named = {"task_type": "CAUSAL_LM", "base_model_name_or_path": str((out / "base").resolve()), "inference_mode": True}
    with _aside(out) as folder:
        (folder / "base").mkdir()
        _model(found, folder / "base", found.dequantized)
        declared = {name: ("F32", value.shape) for name, value in held.items()}
        stands_on = {starts.BASE: found.identity}
        tensors.write(folder / "adapter_model.safetensors", declared, held.values(), stands_on)
        (folder / "adapter_config.json").write_text(json.dumps(config | named, indent=1), encoding="utf-8")
        (folder / "README.md").write_text(README.format(folder=out.resolve()), encoding="utf-8")


def _of_peft(
    base: QuantizedBase, placement: Placement, layout: Layout, vector: Vector
) -> tuple[dict[str, Vector], dict[str, Any]]:
    """peft's tensors and its configuration."""
    if placement.linears:
        return _lora(base, placement, vector)
    if placement.prompt is not None:
        return _virtual("PROMPT_TUNING", placement.prompt.rows(vector))
    if placement.prefix is not None:
        from edge_client.engines.torch_model import prefix_of  # the model computes what a prefix starts from

        return _virtual("PREFIX_TUNING", prefix_of(base, placement, layout, vector))
    if placement.bottlenecks:
        raise UserError("peft knows no bottleneck adapters; write a folder with its own loader with --to torch")
    raise UserError("tuned norms, biases and entries are no LoRA; write the whole model with --to merged")


def _virtual(kind: str, rows: Vector) -> tuple[dict[str, Vector], dict[str, Any]]:
    """What peft calls virtual tokens, a row each."""
    return {"prompt_embeddings": rows}, {
        "peft_type": kind,
        "num_virtual_tokens": len(rows),
        "num_transformer_submodules": 1,
    }


def _lora(base: QuantizedBase, placement: Placement, vector: Vector) -> tuple[dict[str, Vector], dict[str, Any]]:
    factors: dict[str, Vector] = {}
    for module, terms in placement.linears.items():
        a, b = _stacked(base, module, terms, vector)
        factors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    terms = next(iter(placement.linears.values()))
    rank = sum(term.rank for term in terms)
    return factors, {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": terms[0].scale * rank,
        "target_modules": list(placement.linears),
        "lora_dropout": 0.0,
        "bias": "none",
    }


def _stacked(base: QuantizedBase, module: str, terms: tuple[LowRank, ...], vector: Vector) -> tuple[Vector, Vector]:
    """A [ranks, in] and B [out, ranks] of all terms of a layer as one, of the first one's scale."""
    found = [term.factors(vector, *base.shape(f"{module}.weight")) for term in terms]
    scales = [np.float32(term.scale / terms[0].scale) for term in terms]
    b = [b * scale for (_, b), scale in zip(found, scales, strict=True)]
    return np.concatenate([a for a, _ in found]), np.concatenate(b, axis=1)


def to_merged(base: Base, placement: Placement, layout: Layout, vector: Vector, out: Path) -> None:
    """A plain Hugging Face folder: base + scale * B A of every term in float32. Raises UserError if `out` exists."""
    found = _exportable(base)
    if placement.bottlenecks:
        raise UserError(
            "a bottleneck adapter is no part of any weight; write a folder with its own loader with --to torch"
        )

    if placement.prompt is not None or placement.prefix is not None:
        raise UserError("what comes before a text is no part of any weight; write an adapter folder with --to peft")

    def merged(name: str) -> Any:
        module = name.removesuffix(".weight")
        weight = found.dequantized(name)
        if module in placement.gains:
            return weight * (1 + vector[placement.gains[module]])
        if (biased := name.removesuffix(".bias")) in placement.biases and name != biased:
            return weight + vector[placement.biases[biased]]
        if module in placement.entries:
            return weight + placement.entries[module].dense(vector, weight.shape)
        if module not in placement.linears:
            return weight
        for term in placement.linears[module]:
            a, b = term.factors(vector, *weight.shape)
            weight = weight + np.float32(term.scale) * (b @ a)
        return weight

    with _aside(out) as folder:
        _model(found, folder, merged)


def to_torch(base: Base, placement: Placement, layout: Layout, vector: Vector, out: Path) -> None:
    """A folder that loads itself (`load.py`), for bottleneck adapters, which nobody else knows. Raises UserError if `out`
    exists, or for another adapter."""
    found = _exportable(base)
    if not placement.bottlenecks:
        raise UserError("only bottleneck adapters need a loader of their own; use --to peft or --to merged")
    with _aside(out) as folder:
        (folder / "base").mkdir()
        _model(found, folder / "base", found.dequantized)
        declared = {tensor.name: ("F32", tensor.shape) for tensor in layout.tensors}
        tensors.write(folder / "adapter.safetensors", declared, layout.split(vector).values())
        shutil.copyfile(Path(__file__).with_name("taken_home.py"), folder / "load.py")


def _exportable(base: Base) -> QuantizedBase:
    if not isinstance(base, QuantizedBase):
        raise UserError("the toy base has no model to export")
    return base


def _model(base: QuantizedBase, folder: Path, value: Callable[[str], Any]) -> None:
    """One Hugging Face folder in float32, written tensor by tensor."""
    config = json.loads((base.folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "float32"}, indent=1), encoding="utf-8")
    for name in SIDE_FILES:
        if (base.folder / name).exists():
            shutil.copyfile(base.folder / name, folder / name)
    declared = {name: ("F32", base.shape(name)) for name in base.names()}
    tensors.write(folder / "model.safetensors", declared, (value(name) for name in declared))


@contextlib.contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder that becomes `out` when everything is in it, and is gone otherwise."""
    if out.exists():
        raise UserError(f"{out}: exists already; choose another folder")
    folder: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        folder.chmod(0o755)
        yield folder
        folder.rename(out)
    except OSError as error:
        raise MachineError(f"{error.filename or out}: {error.strerror}; nothing was kept") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
