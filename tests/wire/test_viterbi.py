"""The search along the trellis, against one that looks at every path there is."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from wire.codecs import kernels, prices, rans, viterbi, viterbi_numba
from wire.codecs.kernels import ESCAPE, SYMBOLS, UNITS
from wire.codecs.rank_rows import RankRows

ONE = np.zeros(1, np.int64)
LOOPS = pytest.mark.parametrize("loops", [viterbi, viterbi_numba])


def following(state: int, parity: int) -> int:
    """As docs/wire-format.md has it."""
    return (state >> 1) ^ (5 * (state & 1)) ^ (2 * parity)


def quantizers(symbols: Any) -> list[int]:
    """Which quantizer each symbol of one lane is of."""
    found, state = [], 0
    for symbol in symbols:
        found.append(state & 1)
        state = following(state, (int(symbol) + 1) // 2 % 2)
    return found


def some_prices(seed: int, largest: float) -> Any:
    counts = np.random.default_rng(seed).integers(1, 500, (1, 2, kernels.LARGEST + 2)).astype(float)
    return prices.of(prices.Known(counts, np.zeros((1, 2, 4))), largest, 0.3)


def searched(loops: Any, values: Any, priced: Any, lanes: int) -> Any:
    return loops.search(values, ONE, ONE + len(values), ONE, np.float32(UNITS), *priced, lanes)


@LOOPS
@pytest.mark.parametrize("seed", range(4))
def test_no_path_costs_less_than_the_one_that_is_found(loops: Any, seed: int) -> None:
    values = (2 * np.random.default_rng(seed).standard_normal(7)).astype(np.float32)
    costs, levels = some_prices(seed, float(np.abs(values).max()))
    bins = (np.abs(values) * np.float32(UNITS)).astype(int) >> viterbi.BIN_BITS

    def cost(parities: tuple[int, ...]) -> int:
        state, total = 0, 0
        for place, parity in zip(bins, parities, strict=True):
            total += int(costs[0, place, 2 * (state & 1) + parity])
            state = following(state, parity)
        return total

    symbols, _, _ = searched(loops, values, (costs, levels), 1)
    found = tuple((symbols % SYMBOLS + 1) // 2 % 2)
    assert cost(found) == min(cost(path) for path in itertools.product((0, 1), repeat=len(values)))


@LOOPS
@pytest.mark.parametrize(("size", "lanes"), [(3, 4), (64, 32), (101, 32), (40, 4)])
def test_every_lane_is_a_path_from_state_0_and_all_that_is_counted_was_there(loops: Any, size: int, lanes: int) -> None:
    values = (3 * np.random.default_rng(size).standard_normal(size)).astype(np.float32)
    symbols, counts, residuals = searched(loops, values, some_prices(1, float(np.abs(values).max())), lanes)
    for lane in range(min(lanes, size)):
        mine = symbols[lane::lanes]
        assert (mine // SYMBOLS).tolist() == quantizers(mine % SYMBOLS)
    np.testing.assert_array_equal(counts[0], np.bincount(symbols, minlength=2 * SYMBOLS))
    level, second = (symbols % SYMBOLS + 1) // 2, symbols // SYMBOLS
    units = (np.abs(values) * np.float32(UNITS)).astype(int) - UNITS * (2 * level.astype(int) - second)
    assert residuals[0, 1, 0] == units[(level == 1) & (second == 1)].sum()
    assert residuals.sum() == units[level > 0].sum()


@LOOPS
def test_what_is_too_large_for_a_level_is_an_escape_and_the_rest_of_the_path_goes_on(loops: Any) -> None:
    values = np.array([1.0, 900.0, -300.0, 2.0, 5.0], np.float32)
    symbols, _, _ = searched(loops, values, some_prices(2, 900.0), 1)
    assert (symbols % SYMBOLS == ESCAPE).tolist() == [False, True, True, False, False]
    assert (symbols // SYMBOLS).tolist() == quantizers(symbols % SYMBOLS)


@pytest.mark.parametrize("lanes", [4, 32])
def test_both_loops_find_the_same(lanes: int) -> None:
    chance = np.random.default_rng(lanes)
    lengths = np.array([70, 1, 64, 33])
    starts, tables = np.cumsum(lengths) - lengths, np.array([0, 1, -1, 1])
    values = (4 * chance.standard_normal(lengths.sum())).astype(np.float32)
    counts = chance.integers(1, 500, (2, 2, kernels.LARGEST + 2)).astype(float)
    priced = prices.of(prices.Known(counts, np.zeros((2, 2, 4))), float(np.abs(values).max()), 0.3)
    found = [
        loops.search(values, starts, lengths, tables, np.float32(UNITS), *priced, lanes)
        for loops in (viterbi, viterbi_numba)
    ]
    for first, second in zip(*found, strict=True):
        np.testing.assert_array_equal(first, second)


@LOOPS
def test_a_decoder_that_follows_the_path_reads_what_was_written(loops: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LARGE", 0 if loops is viterbi_numba else 1 << 62)
    values = (3 * np.random.default_rng(5).standard_normal(500)).astype(np.float32)
    symbols, counts, _ = searched(loops, values, some_prices(1, float(np.abs(values).max())), 4)
    frequencies = np.array([rans.normalized(each) for each in counts.reshape(2, SYMBOLS)])
    words = kernels.encode(symbols, ONE, ONE + 500, ONE, frequencies.reshape(1, -1), 4)
    reader = rans.Reader(words, 4, 500, 500, 2)
    places = np.arange(2 * SYMBOLS, dtype=np.float32)[None]
    read = reader.read(RankRows(ONE, ONE + 500), ONE, rans.lookup(frequencies).reshape(1, -1), places)
    reader.close()
    np.testing.assert_array_equal(read, symbols)
