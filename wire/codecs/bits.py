"""Small unsigned numbers as bits, the most significant first, padded with 0 to bytes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from wire.errors import PayloadError, Reason


def packed(numbers: npt.NDArray[np.uint16], width: int) -> npt.NDArray[np.uint8]:
    """Each of `numbers` in `width` bits.

    >>> packed(np.array([1, 2, 3], np.uint16), 3).tolist()
    [41, 128]
    """
    if width == 1:
        return np.packbits(numbers.astype(np.uint8))
    table = (numbers.astype(np.uint16)[:, None] >> np.arange(width - 1, -1, -1, dtype=np.uint16)) & 1
    return np.packbits(table.astype(np.uint8).reshape(-1))


def unpacked(data: npt.NDArray[np.uint8], width: int, count: int) -> npt.NDArray[np.uint16]:
    """The inverse: `count` numbers, uint16. Raises PayloadError for padding that is not 0."""
    found = np.unpackbits(data)
    if found[count * width :].any():
        raise PayloadError(Reason.BAD_PAYLOAD, "the padding after the last number is not zero")
    table = found[: count * width].reshape(count, width).astype(np.uint16)
    numbers = np.zeros(count, np.uint16)
    for column in range(width):
        numbers = (numbers << np.uint16(1)) | table[:, column]
    return numbers


def size(count: int, width: int) -> int:
    """Bytes of `count` numbers."""
    return -(-count * width // 8)
