"""Named codecs: expressions over the stages. A run spec says `codec = "top_k_int4"` or lists the stages itself."""

from __future__ import annotations

from collections.abc import Mapping

from wire.spec import Plain

INT8: Plain = {"id": "blockwise", "bits": 8, "block": 64}
INT4: Plain = {"id": "blockwise", "bits": 4, "block": 64}
ROTATION: Plain = {"id": "rank_rotate", "reflectors": 2, "bits": 6}
BALANCE: Plain = {"id": "balance", "halvings": 1}


def top_k_int4(fraction: float) -> list[Plain]:
    """The largest entries in 4 bits, their positions Rice-coded; what is left out is sent in a later round."""
    inner: list[Plain] = [{"id": "top_k", "fraction": fraction}, INT4]
    return [{"id": "error_feedback", "inner": inner}, {"id": "rice"}, {"id": "pack"}]


def ecsq(target_bits: float, *before: Plain) -> list[Plain]:
    """Quantized and entropy-coded to so many bits a parameter; what is lost is sent in a later round."""
    return later({"id": "ecsq", "target_bits": target_bits}, *before)


def ectcq(target_bits: float, *before: Plain) -> list[Plain]:
    """The same along the paths of a trellis."""
    return later({"id": "ecsq", "target_bits": target_bits, "states": 8}, *before)


def later(last: Plain, *before: Plain) -> list[Plain]:
    """Stages with error feedback around them."""
    return [{"id": "error_feedback", "inner": [*before, last]}, {"id": "pack"}]


COMPOSITIONS: Mapping[str, list[Plain]] = {
    "float32": [{"id": "float32"}, {"id": "pack"}],
    "float16": [{"id": "float16"}, {"id": "pack"}],
    "int8": [{"id": "error_feedback", "inner": [INT8]}, {"id": "pack"}, {"id": "zstd"}],
    "int4": [{"id": "error_feedback", "inner": [INT4]}, {"id": "pack"}, {"id": "zstd"}],
    "ecsq": ecsq(0.2),
    "rotated_ecsq": ecsq(0.2, ROTATION),
    "balanced_ecsq": ecsq(0.2, BALANCE, ROTATION),
    "ectcq": ectcq(0.2),
    "rotated_ectcq": ectcq(0.2, ROTATION),
    "balanced_ectcq": ectcq(0.2, BALANCE, ROTATION),
    "top_k_int4": top_k_int4(0.25),
    "top_k_int4_5": top_k_int4(0.05),
}
