"""What methods that measure slopes along directions share: slopes in a round's usual size, and multiples as they travel."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wire.errors import MachineError
from wire.scalars import Directions, Scalars

Numbers = npt.NDArray[np.float64]
LARGEST = 3.0
"""A normalized slope is clipped to this many times the round's usual one: one odd batch must not decide a round."""


class Slopes:
    """Slopes by the running mean of their magnitudes, if `normalize`; as they are otherwise."""

    def __init__(self, normalize: bool) -> None:
        self._normalize = normalize
        self._sum, self._count = 0.0, 0

    def usual(self, slope: float) -> float:
        """`slope` in units of the usual one so far. Raises MachineError if it is not finite."""
        if not np.isfinite(slope):
            raise MachineError("the training loss is not finite; lower the run's learning_rate or epsilon")
        if not self._normalize:
            return slope
        self._sum, self._count = self._sum + abs(slope), self._count + 1
        mean = max(self._sum / self._count, 1e-30)
        return min(LARGEST, max(-LARGEST, slope / mean))


def said(directions: Directions, multiples: Numbers) -> Scalars:
    """Multiples as an update. Raises MachineError for training that diverged."""
    try:
        return Scalars.of(directions, multiples)
    except ValueError as error:
        raise MachineError(f"training has diverged: {error}; lower the run's learning_rate") from error
