"""What the flagship codec leaves on the table, for one recorded delta (docs/codecs.md).

    python -m benchmarks.codec_limits deltas/RUN-0002-DEVICE.safetensors

Conditional entropies of the levels of plain `ecsq` when a table also knows the column, and the Gaussian bound by rank row after
rotations with 1, 2 and 4 reflectors and with the eigenvectors, at half the energy.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.rate_distortion import bound
from experiments.recorded import grouped
from wire.codecs import chain, fitting, rank_rows
from wire.codecs.rank_rotate import RankRotate
from wire.delta import Delta

Floats = npt.NDArray[np.float64]
THREE, EIGHT = (0.75, 1.25), (0.4, 0.6, 0.8, 1.0, 1.2, 1.5, 2.0)
"""Bounds of classes of columns, relative to their mean."""


def above(magnitudes: Floats) -> Floats:
    """Of each entry, the sum of the magnitudes above it in its column."""
    return np.cumsum(magnitudes, axis=0) - magnitudes


def classed(told: Floats, edges: tuple[float, ...]) -> npt.NDArray[np.int64]:
    """Classes of columns, row by row; 0 where nothing is told."""
    mean = told.mean(axis=1, keepdims=True)
    return np.where(mean > 0, 1 + np.digitize(told / np.maximum(mean, 1e-300), edges), 0)


def entropy(symbols: npt.NDArray[np.int64], contexts: npt.NDArray[np.int64]) -> float:
    """Bits of all symbols, given their contexts."""
    both, alone = np.bincount(contexts * 256 + symbols), np.bincount(contexts)
    return float(sum(sign * (n[n > 0] * np.log2(n[n > 0])).sum() for sign, n in ((-1, both), (1, alone))))


def columns(delta: Delta, bits: float) -> str:
    """What knowing the column would save, in bits a parameter."""
    like = chain.shape(delta.layout)["values"]
    values, rows, size = rank_rows.gathered(delta.vector, like.tensors), rank_rows.of(like), delta.layout.size
    coded = fitting.fitted(values, rows, bits * size)
    used = np.repeat(coded.used, rows.lengths)
    told: dict[str, list[npt.NDArray[np.int64]]] = {"3 classes": [], "8 classes": [], "true scale": []}
    start = 0
    for grid in rank_rows.grids(like.tensors):
        place = slice(start, start := start + grid[0] * grid[1])
        levels = (coded.symbols[place].astype(np.float64).reshape(grid) + 1) // 2
        squares = np.square(values[place].astype(np.float64)).reshape(grid)
        told["3 classes"].append(classed(above(levels), THREE).reshape(-1))
        told["8 classes"].append(classed(above(levels), EIGHT).reshape(-1))
        told["true scale"].append(classed(np.sqrt(squares.sum(axis=0) - squares), EIGHT).reshape(-1))
    sent, symbols = used >= 0, coded.symbols.astype(np.int64)
    base = entropy(symbols[sent], used[sent])
    saved = {
        name: base - entropy(symbols[sent], (16 * used + np.concatenate(some))[sent]) for name, some in told.items()
    }
    return "  ".join(f"{name} {value / size:.3f}" for name, value in saved.items())


def rotations(delta: Delta) -> str:
    """The bound by rank row at half the energy, in bits a parameter."""
    like = chain.shape(delta.layout)
    grids, found = rank_rows.grids(like["values"].tensors), []
    sizes = np.concatenate([np.full(rank, width) for rank, width in grids])
    for many in (1, 2, 4):
        turned, _ = RankRotate(reflectors=many).encode({"values": delta.vector}, {}, like)
        energies = [np.square(part).mean(axis=1, dtype=np.float64) for part in _tables(turned["values"], grids)]
        found.append(f"{many} reflectors {bound(np.concatenate(energies), sizes, 0.5):.3f}")
    rows = _tables(rank_rows.gathered(delta.vector, like["values"].tensors).astype(np.float64), grids)
    energies = [np.maximum(np.linalg.eigvalsh(part @ part.T), 0.0) / part.shape[1] for part in rows]
    return "  ".join([*found, f"eigenvectors {bound(np.concatenate(energies), sizes, 0.5):.3f}"])


def _tables(values: npt.NDArray[Any], grids: tuple[tuple[int, int], ...]) -> list[npt.NDArray[Any]]:
    ends = np.cumsum([rank * width for rank, width in grids])[:-1]
    return [part.reshape(grid) for part, grid in zip(np.split(values, ends), grids, strict=True)]


def main() -> None:
    delta = grouped([Path(sys.argv[1])])[0].deltas[0]
    for bits in (1, 2, 3, 4):
        print(f"{bits} bit, saved by knowing the column: {columns(delta, bits)}", flush=True)
    print(f"bound at half the energy: {rotations(delta)}")


if __name__ == "__main__":
    main()
