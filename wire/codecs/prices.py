"""What levels cost along the paths of a trellis: squared error + λ · bits, by how often and for what they came before."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from wire.codecs.kernels import ESCAPE, LARGEST, SYMBOLS, UNITS, Ints
from wire.codecs.rate import Survey
from wire.codecs.viterbi import BIN_BITS

Floats = npt.NDArray[np.float64]
LOW, MORE, MOST = 0.2, 0.08, 0.36
"""What a bit is worth in squares of the step: at high rates the slope of the rate, 0.36, where the error is 0.27 squares; at low
ones less is better."""
PER_STEP = UNITS >> BIN_BITS
MOST_BINS = (2 * LARGEST + 2) * PER_STEP
COST_UNIT = 1 << 12
TOO_MUCH = 1 << 20
DEAD = 0.15
UNSEEN = 0.2
K = np.arange(LARGEST + 2)
"""All levels, and the escape as one more."""
POSITIONS = np.stack([2 * K, np.maximum(2 * K - 1, 0)])
"""In steps, [quantizer, level]."""


@dataclasses.dataclass(frozen=True, eq=False)
class Known:
    """How often levels came, float64 [classes, 2, LARGEST + 2], and how far their centroids are from them, in steps, float64
    [classes, 2, 4]."""

    counts: Floats
    shifts: Floats


def guessed(survey: Survey, step: float) -> Known:
    """What scalar quantization would give."""
    middle = (np.arange(survey.sampled.shape[1]) + 0.5) * survey.scales[:, None] / step
    counts = np.zeros((len(survey.sizes), 2, len(K)))
    for quantizer in (0, 1):
        level = np.clip((middle + quantizer) / 2 + 0.5 - DEAD, 0, LARGEST + 1).astype(np.int64)
        for number, (mine, weights) in enumerate(zip(level, survey.sampled, strict=True)):
            counts[number, quantizer] = np.bincount(mine, weights, len(K))
    return Known(counts, np.zeros((len(survey.sizes), 2, 4)))


def learned(before: Known, guess: Known, counts: Ints, residuals: Ints) -> Known:
    """The mean of what `search` counted and what was known before; `guess` for a class of which nothing but zeros came: what is
    never sent would never become cheap enough to be."""
    counts = counts.reshape(-1, 2, SYMBOLS)
    seen = np.concatenate(
        [counts[..., :1], counts[..., 1:ESCAPE:2] + counts[..., 2:ESCAPE:2], counts[..., ESCAPE:]], -1
    )
    many = np.stack([seen[..., 1], seen[..., 2], seen[..., 3:-1].sum(-1)], -1)
    shifts = np.where(many > 0, (residuals + many / 2) / np.maximum(1, UNITS * many), 0.0)
    shifts = np.concatenate([np.zeros((*many.shape[:2], 1)), shifts], -1)
    some = seen[..., 1:].sum(axis=(1, 2))[:, None, None] > 0
    mixed = seen + before.counts * (seen.sum(-1, keepdims=True) / np.maximum(1, before.counts.sum(-1, keepdims=True)))
    return Known(np.where(some, mixed, guess.counts), np.where(some, shifts, guess.shifts))


def worth(bits: float) -> float:
    """λ, of an update of so many bits an entry."""
    return min(MOST, LOW + MORE * bits)


def of(known: Known, largest: float, worth: float) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
    """`costs` and `levels` as `viterbi` needs them, for magnitudes of up to `largest` steps and a bit's `worth`."""
    bins = min(MOST_BINS, int(largest * PER_STEP) + 1)
    middle = (np.arange(bins) + 0.5) / PER_STEP
    counts = known.counts + UNSEEN
    bits = np.log2(counts.sum(-1, keepdims=True) / counts) + (K > 0)
    centres = POSITIONS + known.shifts[:, :, np.minimum(K, 3)]
    costs, levels = np.empty((len(counts), bins, 4), np.int32), np.empty((len(counts), bins, 4), np.uint8)
    for quantizer in (0, 1):
        for parity in (0, 1):
            below = np.maximum(0, ((middle + quantizer) / 2 - parity).astype(np.int64) // 2 * 2) + parity
            candidates = np.minimum(np.stack([np.full_like(below, parity), below, below + 2]), LARGEST - 1 + parity)
            price = (middle - centres[:, quantizer][:, candidates]) ** 2 + worth * bits[:, quantizer][:, candidates]
            best = np.argmin(price, axis=1)
            at = 2 * quantizer + parity
            costs[:, :, at] = np.minimum(np.rint(price.min(axis=1) * COST_UNIT), TOO_MUCH)
            levels[:, :, at] = candidates[best, np.arange(bins)]
    if bins == MOST_BINS:  # the last is of all that has no level
        costs[:, -1], levels[:, -1] = (0, TOO_MUCH, 0, TOO_MUCH), (LARGEST + 1, LARGEST, LARGEST + 1, LARGEST)
    return costs, levels


def bits_each(counts: Ints) -> Floats:
    """Bits an entry of every class, by what `search` counted [classes, 2 · SYMBOLS]; 0 where nothing was."""
    counts = counts.reshape(len(counts), 2, SYMBOLS)
    total = counts.sum(axis=2)
    bits = np.log2(np.maximum(total, 1)) * total - (np.log2(np.maximum(counts, 1)) * counts).sum(axis=2)
    found: Floats = bits.sum(axis=1) / np.maximum(1, total.sum(axis=1))
    return found
