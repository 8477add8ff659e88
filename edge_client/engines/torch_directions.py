"""Directions and their sums in torch's int64 operations: the same bits on a CPU, on CUDA and on Apple's GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from wire.prng import BLOCK, MULTIPLIERS, ROUNDS, WEYL, Strand, Units

LOW = 0xFFFFFFFF


def combine(strands: Sequence[Strand], size: int, device: torch.device | str = "cpu") -> Units:
    """A `wire.prng.Combine` on `device`."""
    total = torch.zeros(size, dtype=torch.int64, device=device)
    for key, multiples in strands:
        for direction, multiple in enumerate(multiples.tolist()):
            if multiple:
                total += multiple * signs(key, direction, size, device)
    summed: Units = total.cpu().numpy()
    return summed


def available(device: str) -> bool:
    """Whether torch can compute on "cpu", "cuda" or "mps" here."""
    found = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return found[device]


def signs(key: int, direction: int, size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Direction `direction` under `key`: int64 [size] of +1 and -1."""
    words = _philox(-(-size // BLOCK), direction, key, device)
    shifts = torch.arange(32, dtype=torch.int64, device=device)
    drawn = (words.reshape(-1, 1) >> shifts) & 1
    return 1 - 2 * drawn.reshape(-1)[:size]


def _philox(blocks: int, direction: int, key: int, device: torch.device | str) -> torch.Tensor:
    """Words of Philox4x32-10, int64 [blocks, 4] below 2^32."""
    c0 = torch.arange(blocks, dtype=torch.int64, device=device)
    c1 = torch.zeros_like(c0)
    c2, c3 = torch.full_like(c0, direction & LOW), torch.full_like(c0, direction >> 32)
    k0, k1 = key & LOW, key >> 32
    for _ in range(ROUNDS):
        high0, low0 = _product(MULTIPLIERS[0], c0)
        high1, low1 = _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    return torch.stack([c0, c1, c2, c3], dim=1)


def _product(multiplier: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a product of two 32-bit words, by halves: int64 has no room for 64 unsigned bits."""
    below = multiplier * (word & 0xFFFF)
    above = multiplier * (word >> 16) + (below >> 16)
    return above >> 16, ((above & 0xFFFF) << 16) | (below & 0xFFFF)
