"""Who moved what: the weight behind each entry of a sum whose updates are of portions of the layout."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from wire.delta import RANK_AXES, Layout, Tensor
from wire.portions import Portion

Weights = npt.NDArray[np.int64]


class Owners:
    """A number for each place along a tensor's rank axes; of a core, for the larger of its two."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._weights = [np.zeros(_extent(tensor), np.int64) for tensor in layout.tensors]

    def add(self, portion: Portion, weight: int) -> None:
        for number in portion.chosen:
            self._weights[number][: portion.rank] += weight

    def by_tensor(self) -> Iterator[tuple[slice, Weights]]:
        """Each tensor's place, and the weight behind its entries, int64 of a shape that broadcasts to the tensor's."""
        for (tensor, place), weights in zip(self._layout.slices(), self._weights, strict=True):
            yield place, _spread(tensor, weights)


def _extent(tensor: Tensor) -> int:
    axes = RANK_AXES.get(tensor.role, ())
    return tensor.shape[axes[0]] if axes else 1


def _spread(tensor: Tensor, weights: Weights) -> Weights:
    match RANK_AXES.get(tensor.role, ()):
        case (first, second):
            index = np.arange(tensor.shape[first])
            return weights[np.maximum(index[:, None], index[None, : tensor.shape[second]])]
        case (axis,):
            shape = [1] * len(tensor.shape)
            shape[axis] = tensor.shape[axis]
            return weights.reshape(shape)
        case _:
            return weights.reshape([1] * len(tensor.shape))
