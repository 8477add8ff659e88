"""What an update counts in a buffer: less, the older the release it started from (FedBuff, arXiv 2106.06639)."""

from __future__ import annotations

import math
from collections.abc import Sequence

WHOLE = 1 << 16
"""The discount of an update that starts from the newest release."""


def discount(staleness: int) -> int:
    """round(2^16 / sqrt(1 + staleness)), in integers, so that every machine agrees.

    >>> discount(0), discount(3)
    (65536, 32768)
    """
    square = WHOLE * WHOLE // (1 + staleness)
    below = math.isqrt(square)
    return below + (square > below * (below + 1))


def fitted(weights: Sequence[int]) -> list[int]:
    """The weights of one buffer with as many bits taken from all as the largest has over 16; none becomes 0.

    >>> fitted([65536 * 4, 65536 * 2, 3])
    [32768, 16384, 1]
    """
    surplus = max(0, max(weights, default=0).bit_length() - 16)
    return [max(1, weight >> surplus) for weight in weights]
