"""`prompt`: embeddings before the text's own (arXiv 2104.08691; FedPrompt, arXiv 2208.12268); `projected_prompt`: the same moved
in a few fixed directions (FedBPT, arXiv 2310.01467); `prefix`: keys and values in every layer (arXiv 2101.00190)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from edge_client.adapters import Base, Placement, Prefix, Prompt
from edge_client.adapters.low_rank import uniform
from wire.delta import Layout, Tensor, Vector
from wire.errors import SpecError

COMMON = 5_000
"""Tokens to start from are drawn among the first ones of the vocabulary: byte pairs are numbered from the most common."""

USUAL = 0.25
"""The standard deviation of a projected prompt's numbers that moves it about as far as tokens differ: well within what a round's
update may hold."""


def start_tokens(base: Base, count: int, seed: int) -> tuple[int, ...]:
    """The tokens that `count` places start as, the same for everybody. Raises SpecError for a base without an embedding."""
    vocabulary, _ = base.embedding()
    if not vocabulary:
        raise SpecError("this base has no embedding: no prompt can be put before its text")
    drawn = np.random.Philox(key=seed).random_raw(count) % np.uint64(min(COMMON, vocabulary))
    return tuple(int(token) for token in drawn)


def _check_length(length: int) -> None:
    if not 1 <= length <= 4096:
        raise ValueError("length must lie between 1 and 4096")


class _FromZero:
    """What is tuned is added to a start that everybody has, so that the vector starts at zero."""

    def personal(self, base: Base) -> Layout | None:
        return None

    def initial(self, layout: Layout, seed: int, base: Base | None = None) -> Vector:
        return np.zeros(layout.size, np.float32)


@dataclasses.dataclass(frozen=True)
class SoftPrompt(_FromZero):
    """`length` rows E + tuned before the embedded text, with E the embeddings of tokens that are drawn by `seed`."""

    length: int = 20
    seed: int = 0
    id: ClassVar[str] = "prompt"

    def __post_init__(self) -> None:
        _check_length(self.length)

    def narrowed(self, rank: int) -> SoftPrompt:
        return dataclasses.replace(self, length=min(rank, self.length))

    def layout(self, base: Base) -> Layout:
        start_tokens(base, self.length, self.seed)
        return Layout((Tensor("prompt.embeddings", (self.length, base.embedding()[1]), "prompt"),))

    def placement(self, base: Base) -> Placement:
        start = base.embeddings(start_tokens(base, self.length, self.seed))
        return Placement(prompt=Prompt(start, slice(0, start.size)))


@dataclasses.dataclass(frozen=True)
class ProjectedPrompt(_FromZero):
    """`length` rows E + M z: `dimensions` numbers z are tuned, few enough for a search by losses alone. M follows from `seed`,
    and is so large that a z of standard deviation 0.25 moves the rows by the standard deviation of their start."""

    length: int = 20
    dimensions: int = 500
    seed: int = 0
    id: ClassVar[str] = "projected_prompt"

    def __post_init__(self) -> None:
        _check_length(self.length)
        if not 1 <= self.dimensions <= 65_536:
            raise ValueError("dimensions must lie between 1 and 65,536")

    def narrowed(self, rank: int) -> ProjectedPrompt:
        return self

    def layout(self, base: Base) -> Layout:
        start_tokens(base, self.length, self.seed)
        return Layout((Tensor("prompt.z", (self.dimensions,)),))

    def placement(self, base: Base) -> Placement:
        start = base.embeddings(start_tokens(base, self.length, self.seed))
        matrix = uniform(np.random.Philox(key=[self.seed, 1]), start.size, self.dimensions)
        matrix *= np.float32(math.sqrt(3) / USUAL * float(start.std(dtype=np.float64)))
        return Placement(prompt=Prompt(start, slice(0, self.dimensions), matrix))


@dataclasses.dataclass(frozen=True)
class PrefixKeys(_FromZero):
    """In every layer `length` keys and values before the text's own: those of tokens that are drawn by `seed`, + tuned."""

    length: int = 8
    seed: int = 0
    id: ClassVar[str] = "prefix"

    def __post_init__(self) -> None:
        _check_length(self.length)

    def narrowed(self, rank: int) -> PrefixKeys:
        return dataclasses.replace(self, length=min(rank, self.length))

    def layout(self, base: Base) -> Layout:
        start_tokens(base, self.length, self.seed)
        widths = {m.removesuffix(".k_proj"): rows for m, (rows, _) in base.linears().items() if m.endswith(".k_proj")}
        return Layout(tuple(Tensor(f"{m}.prefix", (self.length, 2 * rows), "prompt") for m, rows in widths.items()))

    def placement(self, base: Base) -> Placement:
        places = tuple(place for _, place in self.layout(base).slices())
        return Placement(prefix=Prefix(start_tokens(base, self.length, self.seed), places))
