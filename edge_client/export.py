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
    """A folder that `peft.PeftModel.from_pretrained` loads, its base in `base/`. Raises UserError if `out` exists, or for
    an adapter that is no LoRA."""
    found = _exportable(base)
    if placement.bottlenecks:
        raise UserError("peft knows no bottleneck adapters; write a folder with its own loader with --to torch")
    if not placement.linears:
        raise UserError("tuned norms and biases are no LoRA; write the whole model with --to merged")
    factors: dict[str, Vector] = {}
    for module, terms in placement.linears.items():
        a, b = _stacked(found, module, terms, vector)
        factors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    terms = next(iter(placement.linears.values()))
    rank = sum(term.rank for term in terms)
    with _aside(out) as folder:
        (folder / "base").mkdir()
        _model(found, folder / "base", found.dequantized)
        declared = {name: ("F32", factor.shape) for name, factor in factors.items()}
        tensors.write(folder / "adapter_model.safetensors", declared, factors.values())
        config = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": str((out / "base").resolve()),
            "r": rank,
            "lora_alpha": terms[0].scale * rank,
            "target_modules": list(placement.linears),
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": True,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        (folder / "README.md").write_text(README.format(folder=out.resolve()), encoding="utf-8")


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

    def merged(name: str) -> Any:
        module = name.removesuffix(".weight")
        weight = found.dequantized(name)
        if module in placement.gains:
            return weight * (1 + vector[placement.gains[module]])
        if (biased := name.removesuffix(".bias")) in placement.biases and name != biased:
            return weight + vector[placement.biases[biased]]
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
