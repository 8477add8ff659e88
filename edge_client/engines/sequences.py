"""Token ids to training sequences: packing for plain text, answers only for dialogues."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edge_client.engines import IGNORE, Tokens


def packed(documents: Sequence[Sequence[int]], end: int, length: int) -> list[Tokens]:
    """Documents end to end, `end` after each, cut into sequences of `length`; a last piece of one token is dropped."""
    stream = np.array([token for document in documents for token in (*document, end)], np.int32)
    pieces = [stream[start : start + length] for start in range(0, len(stream), length)]
    return [Tokens(piece, piece) for piece in pieces if len(piece) > 1]


def answered(turns: Sequence[tuple[Sequence[int], bool]], length: int) -> Tokens | None:
    """One dialogue from (ids, learned) pieces in order, cut to `length`; None if nothing learned is left."""
    ids = np.array([token for piece, _ in turns for token in piece], np.int32)[:length]
    learned = np.array([flag for piece, flag in turns for _ in piece], bool)[:length]
    tokens = Tokens(ids, np.where(learned, ids, np.int32(IGNORE)).astype(np.int32))
    return tokens if tokens.targets else None
