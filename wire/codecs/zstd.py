"""Zstd stage: a general compressor over the packed bytes (RFC 8878). The floor that a flagship codec has to beat."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from wire.codecs import State
from wire.errors import MissingExtra, PayloadError, Reason

try:
    import zstandard
except ImportError as error:
    raise MissingExtra("zstandard", "client") from error

STORED, COMPRESSED = b"\x00", b"\x01"
MAX_WINDOW_BYTES = 8 << 20
"""What a decoder sets aside at most, whatever the frame's header asks for."""


@dataclasses.dataclass(frozen=True)
class Zstd:
    """One flag byte, then the bytes as they are (0) or one zstd frame that declares its size (1), whichever is shorter."""

    level: int = 19
    id: ClassVar[str] = "zstd"
    kind: ClassVar[Literal["bytes"]] = "bytes"

    def __post_init__(self) -> None:
        if not 1 <= self.level <= 19:
            raise ValueError("level must lie between 1 and 19")

    def emits(self, like: int) -> int:
        return like + 1

    def init(self, like: int) -> State:
        return {}

    def encode(self, x: bytes, state: State, like: int) -> tuple[bytes, State]:
        frame = zstandard.ZstdCompressor(level=self.level, write_checksum=False).compress(x)
        return (STORED + x if len(frame) >= len(x) else COMPRESSED + frame), {}

    def decode(self, y: bytes, like: int) -> bytes:
        if y[:1] == STORED:
            return y[1:]
        if y[:1] != COMPRESSED:
            raise PayloadError(Reason.BAD_PAYLOAD, "neither stored nor compressed")
        return _decompressed(y[1:], like)


def _decompressed(frame: bytes, longest: int) -> bytes:
    """One frame, whole, of a declared size of 1 to `longest` bytes, and nothing after it."""
    try:
        declared = zstandard.get_frame_parameters(frame).content_size
        if not 1 <= declared <= longest:
            raise PayloadError(Reason.BAD_PAYLOAD, f"a frame of {declared} bytes where 1 to {longest} can be")
        reader = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
        data = reader.decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise PayloadError(Reason.BAD_PAYLOAD, f"not one whole zstd frame: {error}") from error
    if len(data) != declared:
        raise PayloadError(Reason.BAD_PAYLOAD, f"the frame holds {len(data)} bytes and declares {declared}")
    return data
