"""Directions of low rank: their structure, what is kept and what is drawn, and the same bits for ever."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from wire import prng
from wire.delta import Layout, Tensor
from wire.scalars import Directions, Trajectory
from wire.subspace import Subspace

LAYOUT = Layout((Tensor("a", (6, 20)), Tensor("gain", (7,)), Tensor("b", (20, 6))))
SUBZERO, LOZO = Subspace("subzero", 3, 10), Subspace("lozo", 2, 10)


def directions(subspace: Subspace, version: int = 0, count: int = 12) -> list[np.ndarray]:
    rules = Directions("device", count, subspace=subspace)
    state = Trajectory.start(rules, LAYOUT, np.zeros(LAYOUT.size, np.float32), version)
    return [state.direction(7, n) for n in range(count)]


@pytest.mark.parametrize("subspace", [SUBZERO, LOZO], ids=str)
def test_every_entry_is_a_sign(subspace: Subspace) -> None:
    assert all(set(np.unique(z)) == {-1.0, 1.0} for z in directions(subspace))


@pytest.mark.parametrize(("subspace", "shape"), [(SUBZERO, (10, 12)), (LOZO, (6, 20))], ids=["subzero", "lozo"])
def test_a_tensors_direction_has_the_rank_that_was_asked(subspace: Subspace, shape: tuple[int, int]) -> None:
    found = [np.linalg.matrix_rank(z[:120].reshape(shape)) for z in directions(subspace)]
    assert max(found) == subspace.rank


def test_subzero_draws_a_rank_squared_of_signs_a_tensor_and_its_columns_are_orthogonal() -> None:
    basis = SUBZERO.basis(LAYOUT, 0)
    assert basis.drawn == 3 * 3 + 1 * 3 + 3 * 3  # a gain of seven entries is a row: one side of rank one
    spanned = np.zeros((9, 120))
    spanned[basis.index[:120], np.arange(120)] = basis.signs[:120]
    gram = spanned @ spanned.T
    assert np.count_nonzero(gram - np.diag(np.diag(gram))) == 0
    assert np.diag(gram).min() >= 3 * 4  # ten rows and twelve columns in threes: no bucket is empty


def test_what_is_kept_is_kept_until_the_refresh() -> None:
    first, same, other = (SUBZERO.basis(LAYOUT, version) for version in (0, 9, 10))
    assert first is same
    assert not np.array_equal(first.index, other.index)
    never = Subspace("lozo", 2, 0)
    assert np.array_equal(never.basis(LAYOUT, 0).signs, never.basis(LAYOUT, 10_000).signs)


def test_directions_of_a_kept_basis_span_no_more_than_was_drawn_and_others_leave_it() -> None:
    kept = np.linalg.matrix_rank(np.stack(directions(SUBZERO, 0, 60)))
    assert kept == SUBZERO.basis(LAYOUT, 0).drawn
    assert np.linalg.matrix_rank(np.stack(directions(SUBZERO, 0, 60) + directions(SUBZERO, 10, 60))) > kept


def test_the_bits_are_golden() -> None:
    said = {}
    for name, subspace in (("subzero", SUBZERO), ("lozo", LOZO)):
        basis = subspace.basis(LAYOUT, 25)
        said[name] = hashlib.sha256(basis.index.astype("<i4").tobytes() + basis.signs.tobytes()).hexdigest()[:16]
    assert said == {"subzero": "7b78d3e6b2061aca", "lozo": "5e3717a64a2393e6"}


def test_words_are_the_stream_that_signs_are_cut_from() -> None:
    drawn = prng.words(5, 3, 9)
    bits = (drawn[:, None] >> np.arange(32, dtype=np.uint32)) & 1
    assert np.array_equal(1 - 2 * bits.reshape(-1).astype(np.int8), prng.signs(5, 3, 9 * 32))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: Subspace("subzero", 0), "rank"),
        (lambda: Subspace("lozo", 2, -1), "refresh"),
        (lambda: Directions("round", 4, curvature=0.1, subspace=SUBZERO), "curvature"),
        (lambda: Directions("pool", 4, subspace=SUBZERO), "refresh = 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(made: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        made()  # type: ignore[operator]
