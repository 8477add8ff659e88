"""LoRA updates drawn by chance, and what they come to by plain dense arithmetic."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from coordinator.aggregators.products import Pair, Update
from wire.delta import Layout, Tensor, Vector
from wire.portion_rules import tunable
from wire.portions import Portion

Matrix = npt.NDArray[np.float64]


def layout(rank: int = 4, history: int | None = None, modules: int = 2) -> Layout:
    """Modules of [24, 20], [25, 20], ... and a gain."""
    found = []
    for number in range(modules):
        name, rows, columns = f"base_model.model.m{number}.lora_", 24 + number, 20
        found += [
            Tensor(f"{name}A.weight", (rank, columns), "lora_A"),
            Tensor(f"{name}B.weight", (rows, rank), "lora_B"),
        ]
        if history is not None:
            found.append(Tensor(f"{name}A.history.weight", (history, columns), "history_A"))
            found.append(Tensor(f"{name}B.history.weight", (rows, history), "history_B"))
    return Layout((*found, Tensor("norm.weight", (3,), "gain")))


def adapter(whole: Layout, seed: int = 0, learned: bool = True) -> Vector:
    """A start, float32 [size]: A by chance, B too if something is `learned` already, history zero."""
    chance = np.random.default_rng(seed)
    vector = np.zeros(whole.size, np.float32)
    for tensor, place in whole.slices():
        if tensor.role == "lora_A" or (learned and tensor.role in ("lora_B", "gain")):
            vector[place] = chance.normal(size=tensor.size) * 0.3
    return vector


def update(whole: Layout, seed: int, weight: int = 1, rank: int | None = None) -> Update:
    """What a device of `rank` sends: all that it tunes, moved by chance."""
    portion = Portion(tuple(tunable(whole)), rank)
    moved = np.random.default_rng(seed).normal(size=portion.layout(whole).size) * 0.1
    return Update(portion.put(moved.astype(np.float32), whole), weight, portion)


def dense(pair: Pair, vector: Vector, rank: int | None = None) -> Matrix:
    """What a module does, [out, in]: its product, of the first `rank` terms, and its history's."""
    a, b = (place.of(vector).astype(np.float64) for place in (pair.a, pair.b))
    kept = 0.0 if pair.history is None else dense(pair.history, vector)
    product: Matrix = b[:, :rank] @ a[:rank] + kept
    return product


def mean_of_products(pair: Pair, start: Vector, updates: list[Update]) -> Matrix:
    """The weighted mean of what the module does on the devices, [out, in]."""
    does = [dense(pair, start + one.vector, one.portion.rank if one.portion else None) for one in updates]
    return np.average(np.array(does), axis=0, weights=[one.weight for one in updates])


def best(matrix: Matrix, rank: int) -> Matrix:
    """The nearest matrix of `rank`, by a full decomposition."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    cut: Matrix = (left[:, :rank] * values[:rank]) @ right[:rank]
    return cut


def relative(one: Matrix, other: Matrix) -> float:
    """‖one - other‖ / ‖other‖."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))
