"""How to fit a training step into memory: sequences at a time, and whether layers are computed again in backward."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from quantize import QuantizedBase
from wire.errors import MachineError

MIB = 1 << 20
RUNTIME_BYTES = 430 * MIB
"""A process that has imported torch, transformers and peft (measured 389 MiB), and its allocator's slack."""
FLOATS_PER_WIDTH = 14
"""float32 values that autograd keeps a token and layer, in hidden widths: measured on Llama with LoRA on all layers."""
FLOATS_PER_INNER = 6
"""The same in widths of the feed-forward layer."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """`sequences` go forward and backward at once; gradients of the rest are added up. `expected` in bytes."""

    sequences: int
    checkpoint: bool
    expected: int


def plan(
    config: Any, fixed: int, adapter_size: int, batch: int, length: int, limit: int | None, layers: int | None = None
) -> Plan:
    """The fastest plan within `limit` bytes. `fixed`: bytes of weights; `layers`: how many are tuned by gradients, None for
    all. Raises MachineError if none is."""
    held = RUNTIME_BYTES + fixed + 4 * 4 * adapter_size + 4 * config.vocab_size * (config.hidden_size + 3 * 128)
    tried = [
        Plan(n, again, held + n * length * _per_token(config, again, layers or int(config.num_hidden_layers)))
        for again in (False, True)
        for n in _halving(batch)
    ]
    for candidate in tried:
        if limit is None or candidate.expected <= limit:
            return candidate
    least = min(candidate.expected for candidate in tried)
    raise MachineError(
        f"--max-memory {limit / MIB:.0f}M is too little for sequences of {length} tokens: {least / MIB:.0f}M is the least"  # type: ignore[operator]
    )


def resident(base: QuantizedBase) -> int:
    """Bytes of a base in memory: its file, and float32 copies of what is not multiplied from its codes (an 8-bit embedding)."""
    coded = {f"{module}.weight" for module in base.linears()}
    loose = [name for name in base.names() if name not in coded and base.scheme(name) not in ("bf16", "f32")]
    return base.bytes_on_disk + sum(4 * math.prod(base.shape(name)) for name in loose)


def affordable(config: Any, fixed: int, adapter_size: int, batch: int, length: int, limit: int | None) -> int:
    """The most upper layers that steps of a whole batch can be tuned in within `limit` bytes, keeping all activations; at the
    least one, for which `plan` finds a way or raises MachineError."""
    for layers in range(int(config.num_hidden_layers), 1, -1):
        try:
            found = plan(config, fixed, adapter_size, batch, length, limit, layers)
        except MachineError:
            continue
        if found.sequences == batch and not found.checkpoint:
            return layers
    return 1


def _halving(batch: int) -> list[int]:
    sizes = [batch]
    while sizes[-1] > 1:
        sizes.append(sizes[-1] // 2)
    return sizes


def _per_token(config: Any, checkpoint: bool, layers: int) -> int:
    """Bytes of activations a token in `layers` layers."""
    layer: int = 4 * (FLOATS_PER_WIDTH * config.hidden_size + FLOATS_PER_INNER * config.intermediate_size)
    return layer + 4 * layers * int(config.hidden_size) if checkpoint else layer * layers
