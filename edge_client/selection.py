"""A coreset of a device's own text: the sequence in the middle of each group of sequences that the base reads alike.

The selection within a client of FedHDS (arXiv 2410.10926): fused features of all layers, reduced and clustered. Nothing of it
leaves the device; selecting once more among the clients' centroids, as FedHDS does, would need them sent.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from edge_client.adapters.low_rank import leading
from edge_client.engines import Engine, Tokens
from wire.delta import Vector
from wire.run_spec import Selection

Labels = npt.NDArray[np.int64]
DIMENSIONS = 8
"""What is left of the features' dimensions, which are some thousands, before they are grouped."""
MOST_STEPS = 100


def selected(engine: Engine, adapter: Vector, train: Sequence[Tokens], by: Selection | None) -> list[Tokens]:
    """What a device trains on: `train`, or its part that `by` asks for, by what the base makes of it. `adapter` is one that
    computes as the base; the engine's adapter afterwards is unspecified."""
    if by is None:
        return list(train)
    engine.write(adapter)
    chosen = coreset(engine.features(train), math.ceil(by.share * len(train)))
    return [train[number] for number in chosen]


def coreset(features: Vector, count: int) -> list[int]:
    """The numbers, ascending, of at most `count` of the rows of `features` [N, F]: of each group the one nearest to its mean."""
    points = reduced(features, DIMENSIONS)
    labels = grouped(points, count)
    found = []
    for group in np.unique(labels):
        mine = np.flatnonzero(labels == group)
        away = np.square(points[mine] - points[mine].mean(axis=0)).sum(axis=1)
        found.append(int(mine[away.argmin()]))
    return sorted(found)


def reduced(features: Vector, dimensions: int) -> Vector:
    """The rows of `features` [N, F] along their principal components, float32 [N, dimensions]."""
    centred = features - features.mean(axis=0)
    _, b = leading(centred.astype(np.float32), dimensions)  # left vectors, each times the root of its value
    made: Vector = b * np.linalg.norm(b, axis=0)
    return made


def grouped(points: Vector, count: int) -> Labels:
    """A group for each of `points` [N, d], at most `count` of them, by k-means from k-means++ with fixed chance."""
    means = points[_seeds(points, count)]
    labels = np.full(len(points), -1)
    for _ in range(MOST_STEPS):
        nearest = _distances(points, means).argmin(axis=1)
        if np.array_equal(nearest, labels):
            break
        labels = nearest
        means = np.stack([points[labels == n].mean(axis=0) if (labels == n).any() else m for n, m in enumerate(means)])
    return labels


def _seeds(points: Vector, count: int) -> list[int]:
    """Each next one with a chance that grows with the square of its distance from those before."""
    chance = np.random.Generator(np.random.Philox(key=0))
    found = [int(chance.integers(len(points)))]
    away = _distances(points, points[found])[:, 0]
    while len(found) < count and away.sum() > 0:
        found.append(int(chance.choice(len(points), p=away / away.sum())))
        away = np.minimum(away, _distances(points, points[found[-1:]])[:, 0])
    return found


def _distances(points: Vector, means: Vector) -> Vector:
    """Squared, [N, K]."""
    return np.stack([np.square(points - mean).sum(axis=1) for mean in means], axis=1)
