"""The physical limit that codecs are measured against: the rate-distortion function of Gaussian tensors.

For independent Gaussian entries whose variance is known for each tensor, an error of D in the mean takes at least
Σ nᵢ · ½ log₂⁺(σᵢ² / λ) bits, with λ such that Σ nᵢ · min(λ, σᵢ²) = D · Σ nᵢ (reverse water-filling). Entries of any other
distribution of the same variances can be coded in fewer bits, and so can dependent ones.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wire.delta import Delta

Floats = npt.NDArray[np.float64]
HALVINGS = 100


def variances(delta: Delta) -> tuple[Floats, Floats]:
    """Of each tensor the mean square and the entries, float64 [tensors]."""
    parts = [delta.vector[place].astype(np.float64) for _, place in delta.layout.slices()]
    return np.array([np.mean(part * part) for part in parts]), np.array([float(part.size) for part in parts])


def bound(variances: Floats, sizes: Floats, relative: float) -> float:
    """Bits an entry for a squared error of `relative` times the energy.

    >>> bound(np.array([1.0]), np.array([10.0]), 0.25)
    1.0
    """
    if not 0 < relative < 1:
        return 0.0 if relative >= 1 else float("inf")
    low, high = 0.0, float(variances.max())
    for _ in range(HALVINGS):
        level = (low + high) / 2
        enough = (np.minimum(level, variances) * sizes).sum() < relative * (variances * sizes).sum()
        low, high = (level, high) if enough else (low, level)
    rates = 0.5 * np.log2(np.maximum(variances / high, 1.0))
    return float(round((rates * sizes).sum() / sizes.sum(), 12))
