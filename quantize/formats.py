"""Weight schemes: how one matrix is stored, and back to float32. FORMATS says which scheme a base's linear layers get."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Parts = dict[str, Array]
"""The stored arrays of one tensor by suffix: "" for the tensor itself, ".codes", ".absmax"."""
BLOCK = 64
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
"""The sixteen values of NormalFloat4 (arXiv 2305.14314, appendix E)."""


@dataclass(frozen=True)
class Scheme:
    """One way to store a tensor. `stored(shape)` gives suffix -> (safetensors dtype, shape) before a value is seen."""

    stored: Callable[[tuple[int, ...]], dict[str, tuple[str, tuple[int, ...]]]]
    encode: Callable[[Array], Parts]
    decode: Callable[[Parts, tuple[int, ...]], Array]


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def _absmax(values: Array) -> tuple[Array, Array]:
    """[n] as blocks [n / 64, 64], and each block's largest magnitude, float32 [n / 64]."""
    blocks = values.reshape(-1, BLOCK)
    return blocks, np.abs(blocks).max(axis=1)


def encode_nf4(values: Array) -> Parts:
    """Bit for bit what bitsandbytes makes: the nearest value of NF4, the earlier weight in the high half of a byte."""
    blocks, absmax = _absmax(values.astype(np.float32))
    inverse = np.divide(1.0, absmax, out=np.zeros_like(absmax), where=absmax > 0)
    middles = (NF4[1:] + NF4[:-1]) / np.float32(2)
    codes = np.searchsorted(middles, (blocks * inverse[:, None]).reshape(-1)).astype(np.uint8)
    return {".codes": (codes[0::2] << 4) | codes[1::2], ".absmax": absmax}


def decode_nf4(parts: Parts, shape: tuple[int, ...]) -> Array:
    packed = parts[".codes"]
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1, BLOCK)
    values: Array = (NF4[codes] * parts[".absmax"][:, None]).reshape(shape)
    return values


def encode_int8(values: Array) -> Parts:
    """Symmetric: round(127 * weight / absmax) by blocks of 64."""
    blocks, absmax = _absmax(values.astype(np.float32))
    inverse = np.divide(127.0, absmax, out=np.zeros_like(absmax), where=absmax > 0)
    return {".codes": np.rint(blocks * inverse[:, None]).astype(np.int8).reshape(-1), ".absmax": absmax}


def decode_int8(parts: Parts, shape: tuple[int, ...]) -> Array:
    steps = parts[".absmax"] / np.float32(127)
    values: Array = (parts[".codes"].reshape(-1, BLOCK).astype(np.float32) * steps[:, None]).reshape(shape)
    return values


def encode_bfloat16(values: Array) -> Parts:
    """The upper half of a float32, rounded to nearest even; uint16 bit patterns, since numpy has no such type."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return {"": ((bits + (((bits >> 16) & 1) + np.uint32(0x7FFF))) >> 16).astype(np.uint16)}


def decode_bfloat16(parts: Parts, shape: tuple[int, ...]) -> Array:
    return (parts[""].astype(np.uint32) << 16).view(np.float32).reshape(shape)


SCHEMES: Mapping[str, Scheme] = {
    "nf4": Scheme(
        lambda s: {".codes": ("U8", (_size(s) // 2,)), ".absmax": ("F32", (_size(s) // BLOCK,))}, encode_nf4, decode_nf4
    ),
    "int8": Scheme(
        lambda s: {".codes": ("I8", (_size(s),)), ".absmax": ("F32", (_size(s) // BLOCK,))}, encode_int8, decode_int8
    ),
    "bf16": Scheme(lambda s: {"": ("BF16", s)}, encode_bfloat16, decode_bfloat16),
    "f32": Scheme(lambda s: {"": ("F32", s)}, lambda v: {"": v.astype(np.float32)}, lambda p, s: p[""].reshape(s)),
}

FORMATS: Mapping[str, str] = {"nf4": "nf4", "int8": "int8", "bf16": "bf16"}
"""Format of a base -> scheme of its linear layers. Embeddings and heads are bf16, norms and biases f32, in all of them."""
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def scheme_for(name: str, shape: tuple[int, ...], base_format: str) -> str:
    """The scheme of one tensor, from its name and shape alone.

    >>> scheme_for("model.layers.0.self_attn.q_proj.weight", (576, 576), "nf4")
    'nf4'
    >>> scheme_for("model.norm.weight", (576,), "nf4")
    'f32'
    """
    if len(shape) != 2:
        return "f32"
    fits = base_format == "bf16" or _size(shape) % BLOCK == 0
    return FORMATS[base_format] if is_linear(name) and fits else "bf16"


def is_linear(name: str) -> bool:
    """Whether this is the weight of a linear layer that adapters may stand on (the Llama family's names)."""
    return name.endswith(".weight") and name.split(".")[-2] in _LINEARS
