"""Hidden states that are kept between passes, where nothing below them is tuned."""

from __future__ import annotations

from typing import Generic, Protocol, TypeVar

from edge_client.engines import Tokens

KEPT_BYTES = 64 << 20
"""What is kept where nothing says how much memory there is: 227 sequences of 128 tokens at a width of 576."""


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


Hidden = TypeVar("Hidden", bound=Sized)


class Kept(Generic[Hidden]):
    """Hidden states of the sequences used last, [T, D] each, within `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._held: dict[Tokens, Hidden] = {}

    def get(self, sequence: Tokens) -> Hidden | None:
        hidden = self._held.pop(sequence, None)
        if hidden is not None:
            self._held[sequence] = hidden  # the newest again
        return hidden

    def put(self, sequence: Tokens, hidden: Hidden) -> None:
        """Keep `hidden` itself: a view of something larger would keep all of that."""
        self._drop(sequence)
        if hidden.nbytes > self._limit:
            return
        self._held[sequence] = hidden
        self._bytes += hidden.nbytes
        while self._bytes > self._limit:
            self._drop(next(iter(self._held)))

    def forget(self) -> None:
        self._held.clear()
        self._bytes = 0

    def _drop(self, sequence: Tokens) -> None:
        hidden = self._held.pop(sequence, None)
        self._bytes -= 0 if hidden is None else hidden.nbytes
