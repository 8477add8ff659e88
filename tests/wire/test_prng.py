"""Directions are a wire format: known answers, equal bits from every backend, and no correlation between seeds."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pytest

from edge_client.engines import torch_directions
from wire import prng
from wire.prng import Combine, Units

KEY = 0x0123456789ABCDEF
COMBINES: dict[str, Combine] = {
    "numpy": prng.combine_numpy,
    "numba": prng.combine_numba,
    "torch": torch_directions.combine,
}


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [
        ((0, 0, 0, 0), 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ((0xFFFFFFFF,) * 4, (1 << 64) - 1, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_the_published_known_answers_hold(counter: tuple[int, int, int, int], key: int, wanted: str) -> None:
    a, b, c, d = (np.array([word], np.uint64) for word in counter)
    assert " ".join(f"{int(word[0]):08x}" for word in prng.philox((a, b, c, d), key)) == wanted


def test_the_signs_of_a_key_and_direction_are_for_ever() -> None:
    drawn = prng.signs(KEY, 5, 1000)
    assert drawn[:16].tolist() == [1, -1, 1, 1, -1, 1, 1, 1, -1, 1, -1, -1, 1, -1, -1, -1]
    assert hashlib.sha256(drawn.tobytes()).hexdigest()[:16] == "2d35f6e5a686158f"


@pytest.mark.parametrize("backend", sorted(COMBINES))
@pytest.mark.parametrize("size", [1, 127, 128, 129, 1000, 140_000])
def test_every_backend_gives_the_sum_that_the_signs_give(backend: str, size: int) -> None:
    multiples = np.array([3, 0, -(2**31) + 1, 2**31 - 1], np.int64)
    wanted = sum(int(m) * prng.signs(KEY, n, size).astype(np.int64) for n, m in enumerate(multiples))
    other = np.array([0, 7], np.int64)
    wanted = wanted + 7 * prng.signs(9, 1, size).astype(np.int64)
    found = COMBINES[backend]([(KEY, multiples), (9, other)], size)
    assert found.dtype == np.int64
    assert np.array_equal(found, wanted)


def test_keys_and_directions_are_not_correlated() -> None:
    size = 1 << 16
    drawn = [prng.signs(key, n, size).astype(np.float64) for key in (1, 2, 3, KEY) for n in (0, 1, 2, 1 << 32)]
    for i, one in enumerate(drawn):
        assert abs(one.mean()) < 5 / np.sqrt(size)
        for other in drawn[i + 1 :]:
            for lag in (0, 1, 32, 128):
                assert abs(np.dot(one, np.roll(other, lag))) / size < 5 / np.sqrt(size)


def test_a_direction_beyond_32_bits_is_another_one() -> None:
    assert not np.array_equal(prng.signs(KEY, 1, 128), prng.signs(KEY, 1 + (1 << 32), 128))


def test_torch_draws_the_same_signs() -> None:
    assert np.array_equal(torch_directions.signs(KEY, 77, 5000).numpy(), prng.signs(KEY, 77, 5000))


def _on(device: str) -> Callable[[list[tuple[int, Units]], int], Units]:
    return lambda strands, size: torch_directions.combine(strands, size, device)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_gpu_gives_the_same_integers(device: str) -> None:
    import torch

    if not (torch.cuda.is_available() if device == "cuda" else torch.backends.mps.is_available()):
        pytest.skip(f"no {device} on this machine: its bits are not checked here")
    multiples = np.arange(-8, 9, dtype=np.int64)
    assert np.array_equal(_on(device)([(KEY, multiples)], 70_000), prng.combine_numpy([(KEY, multiples)], 70_000))
