"""The loops of the codecs: compiled and in numpy they give the same bits, and say when what they are given cannot be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from wire.codecs import kernels, kernels_numba

BOTH = pytest.mark.parametrize("loops", [kernels, kernels_numba])
ROWS = np.array([0, 4]), np.array([4, 3])
TABLES, SHIFTS = np.array([1, 0]), np.array([0.25, -0.5])


def part() -> Any:
    return np.array([np.nan, 1, np.nan, 2, 3, 4, np.nan], np.float32)


@BOTH
def test_what_has_no_symbol_becomes_the_next_level_with_the_shift_of_its_row(loops: Any) -> None:
    found, levels = part(), np.array([9, 200, -300, 1000], np.int16)
    assert loops.escaped(found, *ROWS, TABLES, SHIFTS, np.float32(0.5), levels, 1) == 4
    assert found.tolist() == [99.75, 1, -149.75, 2, 3, 4, 500.125]


@BOTH
@pytest.mark.parametrize("levels", [[], [200, -300], [200, 0, 300], [0, 200, 300]])
def test_levels_that_are_missing_or_zero_are_told(loops: Any, levels: list[int]) -> None:
    assert loops.escaped(part(), *ROWS, TABLES, SHIFTS, np.float32(0.5), np.array(levels, np.int16), 0) == -1


@BOTH
@pytest.mark.parametrize("rank", [3, 8, 16])
def test_reflections_are_undone_to_rounding_whatever_their_normals(loops: Any, rank: int) -> None:
    chance = np.random.default_rng(rank)
    rows = chance.standard_normal((rank, 100)).astype(np.float32)
    first, second = (chance.integers(-31, 32, rank - n).astype(np.int8) for n in range(2))
    first[0] = second[0] = 31
    turned = rows.copy()
    loops.reflect(turned, first)
    loops.reflect(turned[1:], second)
    assert np.abs(turned - rows).max() > 0.1
    loops.turn_back(turned, np.concatenate([first[1:], second[1:]]), 31, 2)
    assert np.abs(turned - rows).max() < 1e-5


def test_undone_reflections_have_the_same_bits_from_both() -> None:
    chance = np.random.default_rng(0)
    rows, entries = chance.standard_normal((16, 500)).astype(np.float32), chance.integers(-31, 32, 29).astype(np.int8)
    again = rows.copy()
    kernels.turn_back(rows, entries, 31, 2)
    kernels_numba.turn_back(again, entries, 31, 2)
    assert np.array_equal(rows, again)


@BOTH
@pytest.mark.parametrize("largest", [1 << 20, (1 << 31) - 1, 1 << 31, 1 << 52])
@pytest.mark.parametrize("size", [128, 4096, 9001])
def test_codes_of_four_bits_are_added_exactly_however_large_the_unit(loops: Any, largest: int, size: int) -> None:
    chance = np.random.default_rng(size)
    codes, units = chance.integers(-7, 8, size + size % 2), chance.integers(-largest, largest, -(-size // 64))
    units[:2] = largest, -largest
    packed = ((codes[::2] + 8) << 4 | (codes[1::2] + 8)).astype(np.uint8)
    before = chance.integers(-1000, 1000, size)
    total = before.copy()
    least = loops.add_nibbles(total, packed, units, 64)
    assert np.array_equal(total - before, codes[:size] * np.repeat(units, 64)[:size])
    assert least == codes.min()
