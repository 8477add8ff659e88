"""Where a run begins if not as its base: at another run's release or a peft folder, fitted to what the new run tunes.

The same adapter begins where the other ended, entry by entry. Other low-rank factors begin as the leading singular directions of
what the other adds to each weight; after sparse `entries` that is the second stage of SLoRA (arXiv 2308.06522).
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.adapters import Adapter, Base, LowRank, whole_layout
from edge_client.adapters.low_rank import PREFIX, leading
from quantize import tensors
from quantize.formats import decode_bfloat16
from wire.delta import Layout, Vector
from wire.errors import UserError

BASE = "edgetune_base"
"""Under this key an exported folder's tensors name the identity of the base they stand on."""
NOTHING = 1e-6
"""Singular values below this part of the largest are rounding: float32 resolves 6e-8."""
REFUSED = {"use_dora": False, "bias": "none", "modules_to_save": None, "alpha_pattern": {}, "fan_in_fan_out": False}
"""What a peft folder may not say otherwise: it would be more than scale · B · A."""


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """`named` as a person did; `changes`: by module, what makes the float32 [out, in] that is added to its weight. `row` and
    `vector` are of a release, to begin with the same adapter."""

    named: str
    changes: Mapping[str, Callable[[], Vector]]
    row: Adapter | None = None
    vector: Vector | None = None


def of_release(named: str, row: Adapter, base: Base, vector: Vector) -> Source:
    """What an adapter of the shared layout of `row` adds, float32 [layout.size]. Rows that do more than add to weights
    have no changes, and can only be gone on with."""
    placement = row.placement(base)
    shapes = base.linears()
    changes: dict[str, Callable[[], Vector]] = {
        module: functools.partial(_added, terms, vector, shapes[module]) for module, terms in placement.linears.items()
    }
    for module, some in placement.entries.items():
        changes[module] = functools.partial(some.dense, vector, shapes[module])
    alone = placement.modules() == set(changes) and placement.prompt is None and placement.prefix is None
    return Source(named, changes if alone else {}, row, vector)


def of_folder(folder: Path, base: Base) -> Source:
    """A folder that peft writes, or `edgetune run export --to peft`. Raises UserError for one that cannot be read, of another
    base, or with more in it than LoRA's factors."""
    config, file = _config(folder), _tensors(folder)
    if file.metadata.get(BASE, base.identity) != base.identity:
        raise UserError(f"{folder}: tuned on base {file.metadata[BASE][:12]}…, this run has {base.identity[:12]}…")
    shapes = base.linears()
    changes: dict[str, Callable[[], Vector]] = {}
    for module in _modules(file, folder):
        if module not in shapes:
            raise UserError(f"{folder}: the run's base has no module {module!r}; it was tuned on another model")
        a, b = (_read(file, f"{PREFIX}{module}.lora_{part}.weight") for part in "AB")
        if (len(b), *a.shape[1:]) != shapes[module] or b.shape[1:] != a.shape[:1]:
            raise UserError(
                f"{folder}: {module!r} is {len(b)} x {a.shape[-1]} there and {shapes[module]} in the run's base"
            )
        changes[module] = functools.partial(_product, a, b, _scale(config, len(a)))
    return Source(str(folder), changes)


def begun(source: Source, row: Adapter, base: Base, layout: Layout, seed: int) -> tuple[Vector, float]:
    """The adapter to begin with, float32 [layout.size], and how much of the source it could not say: ‖wanted - made‖ / ‖wanted‖
    over all weights. Raises UserError where `row` does not tune what the source changed."""
    if source.row == row and source.vector is not None:
        return source.vector, 0.0
    whole = whole_layout(row, base)
    vector, linears, shapes = row.initial(whole, seed, base), row.placement(base).linears, base.linears()
    _check(source, linears, layout)
    lost = asked = 0.0
    for module, change in source.changes.items():
        wanted, first = change(), linears[module][0]
        _put(first, wanted, vector)
        lost += float(np.square(wanted - _added((first,), vector, shapes[module])).sum(dtype=np.float64))
        asked += float(np.square(wanted).sum(dtype=np.float64))
    return vector[: layout.size], float(np.sqrt(lost / asked)) if asked else 0.0


def _check(source: Source, linears: Mapping[str, tuple[LowRank, ...]], layout: Layout) -> None:
    """Raises UserError where what the source changed cannot be said by factors that this run shares."""
    if not source.changes:
        raise UserError(
            f"{source.named}: what it tuned is no part of the weights, so that only a run of the very same adapter starts from it"
        )
    if missing := sorted(set(source.changes) - set(linears)):
        raise UserError(
            f"{source.named}: it changed {missing[0]!r}, which this run does not tune; widen targets or layers"
        )
    for module in source.changes:
        first, *others = linears[module]
        if not _shared(first, layout.size) or any(isinstance(term.a, np.ndarray) for term in others):
            raise UserError(
                f"{source.named}: another adapter than this run's, whose factors of {module!r} are not both free and shared;"
                ' tune [method.adapter] id = "lora" without a start of its own, or the same adapter'
            )


def _shared(term: LowRank, size: int) -> bool:
    """Whether both factors are tuned, and by all devices together."""
    parts = [part for part in (term.a, term.b) if isinstance(part, slice)]
    return len(parts) == 2 and term.core is None and all(part.stop <= size for part in parts)


def _put(term: LowRank, wanted: Vector, vector: Vector) -> None:
    """The nearest factors of the term's rank. Directions that nothing is left for keep their row of A and zeros in B, so that
    they can be learned."""
    assert isinstance(term.a, slice) and isinstance(term.b, slice), "checked before"
    a, b = leading((wanted / np.float32(term.scale)).astype(np.float32), term.rank)
    sizes: Vector = np.square(b).sum(axis=0)  # singular values
    used = (sizes > NOTHING * sizes.max()) & (sizes > 0)
    spare = vector[term.a].reshape(a.shape)
    vector[term.a] = np.where(used[:, None], a, spare).reshape(-1)
    vector[term.b] = np.where(used, b, 0).reshape(-1)


def _added(terms: tuple[LowRank, ...], vector: Vector, shape: tuple[int, int]) -> Vector:
    """What low-rank terms add to a weight of `shape`."""
    weight = np.zeros(shape, np.float32)
    for term in terms:
        a, b = term.factors(vector, *shape)
        weight += np.float32(term.scale) * (b @ a)
    return weight


def _product(a: Vector, b: Vector, scale: float) -> Vector:
    made: Vector = np.float32(scale) * (b @ a)
    return made


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as what peft writes: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError(f"{path}: not of LoRA; a run starts from low-rank factors, or from a release of its own kind")
    for key, plain in REFUSED.items():
        if config.get(key, plain) not in (plain, None):
            raise UserError(f"{path}: {key} = {config[key]!r} is more than scale · B · A")
    return config


def _tensors(folder: Path) -> tensors.SafeTensors:
    return tensors.SafeTensors(folder / "adapter_model.safetensors")


def _modules(file: tensors.SafeTensors, folder: Path) -> list[str]:
    """The modules that have both factors. Raises UserError for any other tensor."""
    names = set(file.names())
    found = sorted(n.removeprefix(PREFIX).removesuffix(".lora_A.weight") for n in names if n.endswith(".lora_A.weight"))
    other = names - {f"{PREFIX}{module}.lora_{part}.weight" for module in found for part in "AB"}
    if other or len(names) != 2 * len(found) or not found:
        raise UserError(
            f"{folder}: {min(other, default='its tensors')}: expected lora_A and lora_B of each module alone"
        )
    return found


def _read(file: tensors.SafeTensors, name: str) -> Vector:
    """A matrix as float32. Raises UserError for another kind of tensor."""
    kind, values = file.dtype(name), file.read(name)
    if values.ndim != 2 or kind not in ("F32", "F16", "BF16", "F64"):
        raise UserError(f"{file.path}: {name}: expected a matrix of floating point numbers")
    made = decode_bfloat16({"": values}, values.shape) if kind == "BF16" else values.astype(np.float32)
    if not np.isfinite(made).all():
        raise UserError(f"{file.path}: {name}: has an entry that is not a finite number")
    return made


def _scale(config: Mapping[str, Any], rank: int) -> float:
    """peft's: alpha / rank, or alpha / sqrt(rank). Raises UserError."""
    alpha = config.get("lora_alpha")
    if not isinstance(alpha, int | float) or not np.isfinite(alpha):
        raise UserError(f"adapter_config.json: lora_alpha = {alpha!r} is not a number")
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
