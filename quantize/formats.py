"""Weight schemes: how one matrix is stored, and back to float32. FORMATS says which scheme a base's linear layers get."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from quantize.errors import QuantizeError

Array = npt.NDArray[Any]
Parts = dict[str, Array]
"""The stored arrays of one tensor by suffix: "" for the tensor itself, ".codes", ".absmax"."""
BLOCK = 64
SMALL = 32
"""Weights a block of the schemes that onnxruntime multiplies from: GGUF's own block."""
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
class Blocks:
    """A matrix already in blocks along its rows: weight = scales · (codes - zero) + offsets, as a source file holds it.

    `codes` uint8 [out, in / 32, 32]; `scales` and `offsets` float32 [out, in / 32].
    """

    bits: int
    codes: Array
    scales: Array
    offsets: Array


@dataclass(frozen=True)
class Scheme:
    """One way to store a tensor. `stored(shape)` gives suffix -> (safetensors dtype, shape) before a value is seen.

    `pack`, where a scheme has it, takes the blocks of a source file as they are: nothing is quantized twice.
    """

    stored: Callable[[tuple[int, ...]], dict[str, tuple[str, tuple[int, ...]]]]
    encode: Callable[[Array], Parts]
    decode: Callable[[Parts, tuple[int, ...]], Array]
    pack: Callable[[Blocks], Parts] | None = None
    bits: int = 0


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


def q4_blocks(values: Array) -> Blocks:
    """Each block of 32 between its smallest and its largest weight in 15 equal steps, ends rounded to half precision."""
    blocks = values.astype(np.float32).reshape(len(values), -1, SMALL)
    low = blocks.min(axis=2).astype(np.float16).astype(np.float32)
    step = ((blocks.max(axis=2) - low) / 15).astype(np.float16).astype(np.float32)
    inverse = np.divide(1.0, step, out=np.zeros_like(step), where=step > 0)
    codes = np.clip(np.rint((blocks - low[..., None]) * inverse[..., None]), 0, 15).astype(np.uint8)
    return Blocks(4, codes, step, low + 8 * step)


def pack_q4(blocks: Blocks) -> Parts:
    """Two weights a byte, the earlier in the low half; offsets with the blocks first, as a product with block sums wants."""
    packed = blocks.codes[..., 0::2] | (blocks.codes[..., 1::2] << 4)
    return {
        ".codes": packed,
        ".scales": blocks.scales.astype(np.float32),
        ".offsets": np.ascontiguousarray(blocks.offsets.astype(np.float32).T),
    }


def encode_q4(values: Array) -> Parts:
    return pack_q4(q4_blocks(values))


def decode_q4(parts: Parts, shape: tuple[int, ...]) -> Array:
    packed = parts[".codes"]
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(shape[0], -1, SMALL).astype(np.float32)
    values: Array = (codes - np.float32(8)) * parts[".scales"][..., None] + parts[".offsets"].T[..., None]
    return values.reshape(shape)


def pack_q8(blocks: Blocks) -> Parts:
    return {".codes": blocks.codes, ".scales": blocks.scales.astype(np.float32)}


def encode_q8(values: Array) -> Parts:
    """Symmetric in blocks of 32: round(127 * weight / absmax) + 128."""
    blocks = values.astype(np.float32).reshape(len(values), -1, SMALL)
    steps = np.abs(blocks).max(axis=2) / np.float32(127)
    inverse = np.divide(1.0, steps, out=np.zeros_like(steps), where=steps > 0)
    codes = (np.rint(blocks * inverse[..., None]) + 128).astype(np.uint8)
    return pack_q8(Blocks(8, codes, steps, np.zeros_like(steps)))


def decode_q8(parts: Parts, shape: tuple[int, ...]) -> Array:
    codes = parts[".codes"].astype(np.float32)
    values: Array = ((codes - np.float32(128)) * parts[".scales"][..., None]).reshape(shape)
    return values


SCHEMES: Mapping[str, Scheme] = {
    "nf4": Scheme(
        lambda s: {".codes": ("U8", (_size(s) // 2,)), ".absmax": ("F32", (_size(s) // BLOCK,))}, encode_nf4, decode_nf4
    ),
    "int8": Scheme(
        lambda s: {".codes": ("I8", (_size(s),)), ".absmax": ("F32", (_size(s) // BLOCK,))}, encode_int8, decode_int8
    ),
    "bf16": Scheme(lambda s: {"": ("BF16", s)}, encode_bfloat16, decode_bfloat16),
    "q4": Scheme(
        lambda s: {
            ".codes": ("U8", (s[0], s[1] // SMALL, SMALL // 2)),
            ".scales": ("F32", (s[0], s[1] // SMALL)),
            ".offsets": ("F32", (s[1] // SMALL, s[0])),
        },
        encode_q4,
        decode_q4,
        pack_q4,
        bits=4,
    ),
    "q8": Scheme(
        lambda s: {".codes": ("U8", (s[0], s[1] // SMALL, SMALL)), ".scales": ("F32", (s[0], s[1] // SMALL))},
        encode_q8,
        decode_q8,
        pack_q8,
        bits=8,
    ),
    "f32": Scheme(lambda s: {"": ("F32", s)}, lambda v: {"": v.astype(np.float32)}, lambda p, s: p[""].reshape(s)),
}


@dataclass(frozen=True)
class Format:
    """Which scheme a base's linear layers get, and its embedding and head. Norms and biases are f32 in all of them."""

    linear: str
    table: str = "bf16"


FORMATS: Mapping[str, Format] = {
    "nf4": Format("nf4"),
    "int8": Format("int8"),
    "bf16": Format("bf16"),
    "int4-onnx": Format("q4", "q8"),
}
"""`int4-onnx` is the one that the onnx engine computes from (and torch too, so that both tune one function)."""
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def scheme_for(name: str, shape: tuple[int, ...], base_format: str) -> str:
    """The scheme of one tensor, from its name and shape alone. Raises QuantizeError for a shape without whole blocks.

    >>> scheme_for("model.layers.0.self_attn.q_proj.weight", (576, 576), "nf4")
    'nf4'
    >>> scheme_for("model.norm.weight", (576,), "nf4")
    'f32'
    """
    if len(shape) != 2:
        return "f32"
    chosen = FORMATS[base_format].linear if is_linear(name) else FORMATS[base_format].table
    if chosen in ("q4", "q8") and shape[1] % SMALL:
        raise QuantizeError(
            f"{name}: rows of {shape[1]} weights are no whole blocks of {SMALL}; choose another --format"
        )
    if chosen in ("nf4", "int8") and _size(shape) % BLOCK:
        return FORMATS[base_format].table
    return chosen


def is_linear(name: str) -> bool:
    """Whether this is the weight of a linear layer that adapters may stand on (the Llama family's names)."""
    return name.endswith(".weight") and name.split(".")[-2] in _LINEARS


def is_norm(name: str) -> bool:
    """Whether this is the gain of a norm.

    >>> is_norm("model.layers.0.input_layernorm.weight")
    True
    """
    return name.endswith("norm.weight")
