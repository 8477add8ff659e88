"""Factors turned towards the release they came from, so that their mean loses less (FedRot-LoRA, arXiv 2602.23638)."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from wire.delta import Layout, Vector

Matrix = npt.NDArray[np.float64]


def aligned(
    adapter: Vector, release: Vector, layout: Layout, strength: float, by: str, tuned: tuple[int, ...] | None
) -> Vector:
    """`adapter`, float32 [layout.size], with every pair of tuned factors turned: A to R A and B to B Rᵀ, so that B A stays.

    R takes the factor `by` ("A" or "B") as near to the release's as a rotation can; with a `strength` below 1, R is the rotation
    nearest to that share of it and the rest of none.
    """
    turned, slices = adapter.copy(), [place for _, place in layout.slices()]
    for a, b in _pairs(layout):
        if tuned is not None and not {a, b} <= set(tuned):
            continue  # a frozen factor is the same everywhere, and must stay so
        shapes = layout.tensors[a].shape, layout.tensors[b].shape
        now_a, then_a = (v[slices[a]].reshape(shapes[0]).astype(np.float64) for v in (adapter, release))
        now_b, then_b = (v[slices[b]].reshape(shapes[1]).astype(np.float64) for v in (adapter, release))
        turn = rotation(then_a @ now_a.T if by == "A" else then_b.T @ now_b, strength)
        turned[slices[a]] = (turn @ now_a).reshape(-1)
        turned[slices[b]] = (now_b @ turn.T).reshape(-1)
    return turned


def rotation(agreement: Matrix, strength: float) -> Matrix:
    """The rotation R [r, r] of the largest trace(Rᵀ agreement), as far as `strength`; none where nothing agrees."""
    if not agreement.any():
        return np.eye(len(agreement))
    whole = _nearest(agreement)
    return whole if strength == 1 else _nearest(strength * whole + (1 - strength) * np.eye(len(whole)))


def _nearest(matrix: Matrix) -> Matrix:
    """The rotation nearest to `matrix`: its polar factor, without a reflection."""
    left, _, right = np.linalg.svd(matrix)
    left[:, -1] *= np.sign(np.linalg.det(left @ right))
    nearest: Matrix = left @ right
    return nearest


def _pairs(layout: Layout) -> Iterator[tuple[int, int]]:
    """The places of every A and its B."""
    numbers = {tensor.name: number for number, tensor in enumerate(layout.tensors)}
    for number, tensor in enumerate(layout.tensors):
        partner = numbers.get(tensor.name.replace("lora_A", "lora_B"))
        if tensor.role == "lora_A" and partner is not None:
            yield number, partner
