"""Chance that both ends repeat: Philox under a seed that is sent, or one that stands in the spec."""

from __future__ import annotations

import hashlib

import numpy as np

from wire.delta import Vector


def seed_of(vector: Vector) -> np.uint64:
    """A seed that follows from what is coded, so that encoding twice gives the same bytes, and two devices different ones."""
    return np.uint64(int.from_bytes(hashlib.sha256(vector.tobytes()).digest()[:8], "little"))


def uniform(seed: int, count: int) -> Vector:
    """float32 [count], uniform in 0 … 1 (without 1), in steps of 2^-24."""
    raw = np.random.Philox(key=seed).random_raw(count)
    return (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def signs(seed: int, count: int) -> Vector:
    """float32 [count] of +1 and -1."""
    raw = np.random.Philox(key=seed).random_raw(-(-count // 64)).astype("<u8")
    drawn = np.unpackbits(raw.view(np.uint8), bitorder="little")[:count]
    return np.float32(1) - np.float32(2) * drawn.astype(np.float32)
