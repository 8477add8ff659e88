"""What coding costs on one core: processor time against a float32 `y += a x` over the same number of entries, in the same run.

    make bench-codecs

Updates are made up: 4.9 million entries of LoRA factors of rank 16 with much of their energy along two directions. Six of them
are taken in turns, so that none is found in the cache.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numba
import numpy as np

from coordinator.aggregators.mean import FixedPointSum
from wire.codecs import chain
from wire.codecs.compositions import INT4, INT8, ROTATION
from wire.delta import Delta, Layout, Tensor

REPEATS, UPDATES = 15, 6
PACK: Any = {"id": "pack"}
CODECS: dict[str, list[Any]] = {
    "int4": [INT4, PACK],
    "int8": [INT8, PACK],
    "nf4": [{"id": "normal_float"}, PACK],
    **{f"ecsq at {bits:g}": [{"id": "ecsq", "target_bits": bits}, PACK] for bits in (0.2, 1, 2, 4)},
    **{f"rotated_ecsq at {bits:g}": [ROTATION, {"id": "ecsq", "target_bits": bits}, PACK] for bits in (0.2, 1, 2, 4)},
}


def layout() -> Layout:
    """That of rank 16 on all linear layers of a model of 30 layers."""
    shapes = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)] * 30
    factors = [
        [Tensor(f"{n}.a", (16, i), "lora_A"), Tensor(f"{n}.b", (o, 16), "lora_B")] for n, (i, o) in enumerate(shapes)
    ]
    return Layout(tuple(t for pair in factors for t in pair))


def update(made: Layout, seed: int) -> Delta:
    chance = np.random.default_rng(seed)
    parts = []
    for tensor in made.tensors:
        rows, columns = tensor.shape
        common = chance.standard_normal((rows, 2), np.float32) @ chance.standard_normal((2, columns), np.float32)
        parts.append((0.001 * (2 * common + chance.standard_normal(tensor.shape, np.float32))).reshape(-1))
    return Delta(made, np.concatenate(parts))


@numba.njit(nogil=True)
def axpy(total: Any, x: Any, a: Any) -> None:
    for i in range(total.size):
        total[i] += a * x[i]


def seconds(work: Callable[[int], object]) -> float:
    """Processor time of this thread, the median over turns."""
    work(0)
    times = []
    for number in range(REPEATS):
        began = time.thread_time()
        work(number % UPDATES)
        times.append(time.thread_time() - began)
    return median(times)


def main() -> None:
    made = layout()
    deltas = [update(made, seed) for seed in range(UPDATES)]
    total = np.zeros(made.size, np.float32)
    for name, stages in CODECS.items():
        codec, summed = chain.codec(stages), FixedPointSum(made)
        payloads = [codec.encode(delta, {})[0] for delta in deltas]
        encode = seconds(functools.partial(_encode, codec, deltas))
        fold = seconds(functools.partial(_fold, codec, payloads, summed, made))
        unit = seconds(lambda n: axpy(total, deltas[n].vector, np.float32(0.5)))  # beside each: memory is shared
        print(
            f"{name:20} {8 * len(payloads[0]) / made.size:6.3f} bit  encode {1e-6 * made.size / encode:6.1f} Mparam/s"
            f"  decode and accumulate {1e-6 * made.size / fold:6.1f} Mparam/s, {fold / unit:5.2f} times the axpy"
            f" ({1e-6 * made.size / unit:.0f})",
            flush=True,
        )


def _encode(codec: chain.Chain, deltas: list[Delta], number: int) -> None:
    codec.encode(deltas[number], {})


def _fold(codec: chain.Chain, payloads: list[bytes], total: FixedPointSum, made: Layout, number: int) -> None:
    assert total.add_coded(codec, payloads[number], made, 1)


if __name__ == "__main__":
    main()
