"""Entropy stage: `codes` in about as many bits as they inform, by rANS with one table. No model of where they come from."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import numpy as np

from wire.codecs import Fields, FieldShape, Shape, State, expect, kernels, rans
from wire.codecs.kernels import SYMBOLS, TOTAL
from wire.codecs.rank_rows import RankRows
from wire.errors import PayloadError, Reason

ONE = np.zeros(1, np.int64)


@dataclasses.dataclass(frozen=True)
class Entropy:
    """`codes` uint8 [n] -> `frequencies` uint16 [256] and `words` uint16."""

    id: ClassVar[str] = "entropy"
    kind: ClassVar[Literal["fields"]] = "fields"

    def emits(self, like: Shape) -> Shape:
        size = expect(like, "codes", "uint8").length
        rest = {name: shape for name, shape in like.items() if name != "codes"}
        words = FieldShape("uint16", size + 2 * rans.lanes(size), bounded=True)
        return {**rest, "frequencies": FieldShape("uint16", SYMBOLS), "words": words}

    def init(self, like: Shape) -> State:
        return {}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        codes, rest = x["codes"], {name: field for name, field in x.items() if name != "codes"}
        frequencies, size = rans.spread(np.bincount(codes, minlength=SYMBOLS)), len(codes)
        kernel, length = kernels.fastest(size), np.array([size])
        words = kernel.encode(codes, ONE, length, ONE, frequencies[None], rans.lanes(size))
        return {**rest, "frequencies": frequencies.astype(np.uint16), "words": words}, {}

    def decode(self, y: Fields, like: Shape) -> Fields:
        frequencies, size = y["frequencies"].astype(np.int64), like["codes"].length
        if frequencies.sum() != TOTAL:
            raise PayloadError(Reason.BAD_PAYLOAD, "frequencies do not add up")
        reader = rans.Reader(y["words"], rans.lanes(size), size, size)
        identity = np.arange(SYMBOLS, dtype=np.uint8)[None]
        codes = reader.read(RankRows(ONE, np.array([size])), ONE, rans.lookup(frequencies[None]), identity)
        reader.close()
        return {**{name: field for name, field in y.items() if name in like}, "codes": codes}
