"""What multiplying devices' factors costs a coordinator, on one core, against whole matrices and full decompositions.

    make bench-factors

32 devices of rank 16 on all linear layers of SmolLM2-135M, 4.9 million entries each, made up: half of each update is common to
all. The baseline forms the mean of the products of one layer of 30, [out, in], and decomposes it; its time is taken 30 times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import numpy as np

from coordinator.aggregators import AGGREGATORS
from coordinator.aggregators.products import Pair, Update, aggregation_error, pairs, terms
from wire import spec
from wire.delta import HISTORY, Layout, Tensor, Vector

DEVICES, RANK, LAYERS, HISTORY_RANK, REPEATS = 32, 16, 30, 32, 3
SHAPES = ((576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536))


def module(name: str, rows: int, columns: int, history: bool) -> Iterator[Tensor]:
    yield Tensor(f"{name}.lora_A.weight", (RANK, columns), "lora_A")
    yield Tensor(f"{name}.lora_B.weight", (rows, RANK), "lora_B")
    if history:
        yield Tensor(f"{name}.lora_A.history.weight", (HISTORY_RANK, columns), "history_A")
        yield Tensor(f"{name}.lora_B.history.weight", (rows, HISTORY_RANK), "history_B")


def layout(layers: int, history: bool) -> Layout:
    named = ((f"layers.{n}.{k}", shape) for n in range(layers) for k, shape in enumerate(SHAPES))
    return Layout(tuple(t for name, shape in named for t in module(name, *shape, history)))


def start(made: Layout) -> Vector:
    """As a run starts: A by chance, all else zero."""
    chance, vector = np.random.default_rng(0), np.zeros(made.size, np.float32)
    for tensor, place in made.slices():
        if tensor.role == "lora_A":
            vector[place] = chance.uniform(-1, 1, tensor.size) / np.sqrt(tensor.shape[1])
    return vector


def updates(made: Layout) -> list[Update]:
    chance = np.random.default_rng(1)
    tuned = np.concatenate([np.full(t.size, t.role not in HISTORY) for t in made.tensors])
    common = chance.standard_normal(made.size, np.float32)
    drawn = (common + chance.standard_normal(made.size, np.float32) for _ in range(DEVICES))
    return [Update(np.float32(0.01) * tuned * vector, 7) for vector in drawn]


def aggregated(row: str, made: Layout, adapter: Vector, sent: list[Update]) -> Vector:
    total = spec.build(AGGREGATORS, {"id": row}).start(made, adapter)
    for one in sent:
        total.add(one.vector, one.weight)
    delta: Vector = total.mean()
    return delta


def by_whole_matrices(adapter: Vector, sent: list[Update], modules: list[Pair]) -> None:
    for pair in modules:
        mean = sum(term.share * (term.product.b @ term.product.a) for term in terms(pair, adapter, sent))
        np.linalg.svd(mean, full_matrices=False)


def main() -> None:
    small = layout(1, history=False)
    adapter, sent = start(small), updates(small)
    whole = LAYERS * min(_seconds(lambda: by_whole_matrices(adapter, sent, pairs(small))) for _ in range(REPEATS))
    print(f"{'mean of whole products, full SVD':34} {whole:6.1f} s")
    for row in sorted(AGGREGATORS):
        made = layout(LAYERS, history=row in ("flora", "fedex"))
        adapter, sent = start(made), updates(made)
        took = min(_seconds(lambda: aggregated(row, made, adapter, sent)) for _ in range(REPEATS))  # noqa: B023
        release = adapter + aggregated(row, made, adapter, sent)
        began = time.process_time()
        error = aggregation_error(made, adapter, release, sent)
        meter = time.process_time() - began
        print(
            f"{row:34} {took:6.2f} s, {took / whole:5.3f} times; error {error:.1e}, measured in {meter:.1f} s",
            flush=True,
        )


def _seconds(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


if __name__ == "__main__":
    main()
