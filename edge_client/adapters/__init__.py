"""Adapters: what is tuned. A row says which tensors lie in the flat vector, how they start, and where the model uses them.

How it is tuned is a method's matter: every method works on every adapter, through one flat float32 vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from wire.delta import Layout, Vector, layer_number


class Base(Protocol):
    """A frozen base as adapters and engines see it; `quantize.QuantizedBase` is one."""

    @property
    def identity(self) -> str: ...

    def linears(self) -> Mapping[str, tuple[int, int]]:
        """Module name -> (out, in) of every linear layer an adapter may stand on, in the model's order."""

    def norms(self) -> Mapping[str, int]:
        """Module name -> width of every norm with a gain, in the model's order."""

    def biases(self) -> Mapping[str, int]:
        """Module name -> width of every linear layer's bias."""

    def embedding(self) -> tuple[int, int]:
        """Tokens of the vocabulary, and the width of their embeddings; (0, 0) for a base without any."""

    def embeddings(self, tokens: Sequence[int]) -> Vector:
        """The rows of `tokens` as float32 [len(tokens), width]."""

    def dequantized(self, name: str) -> Any:
        """A tensor as float32."""


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """One low-rank term of a linear layer: y += scale · b · core · a · x. Each part is a place in the flat vector, or fixed
    float32.

    `a` [rank, in], `b` [out, rank], `core` [rank, rank] or None for none.
    """

    rank: int
    scale: float
    a: slice | Vector
    b: slice | Vector
    core: slice | None = None

    def factors(self, vector: Vector, rows: int, columns: int) -> tuple[Vector, Vector]:
        """A [rank, columns], with the core in it, and B [rows, rank] of a layer [rows, columns]."""
        a, b = _part(self.a, vector, (self.rank, columns)), _part(self.b, vector, (rows, self.rank))
        return (a if self.core is None else _part(self.core, vector, (self.rank, self.rank)) @ a), b


@dataclasses.dataclass(frozen=True, eq=False)
class Bottleneck:
    """What a linear layer gives, y, becomes y + up · gelu(down · y): places of `down` [width, out] and `up` [out, width]."""

    width: int
    down: slice
    up: slice


@dataclasses.dataclass(frozen=True, eq=False)
class Entries:
    """Something is added to the entries of a weight at `positions`, int64 [n] in the flat weight: the vector's at `place`."""

    place: slice
    positions: Any

    def dense(self, vector: Vector, shape: tuple[int, int]) -> Vector:
        """float32 [out, in], zeros elsewhere."""
        weight = np.zeros(shape, np.float32)
        weight.reshape(-1)[self.positions] = vector[self.place]
        return weight


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
    """Rows before the embedded text: `start` [T, D] + what is tuned, a place as large, or + `matrix` [T·D, d] times it."""

    start: Vector
    place: slice
    matrix: Vector | None = None

    def rows(self, vector: Vector) -> Vector:
        """float32 [T, D]."""
        tuned = vector[self.place]
        moved = tuned if self.matrix is None else self.matrix @ tuned
        return self.start + moved.reshape(self.start.shape)


@dataclasses.dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values before the text's own: those of `tokens` under the base, + what is tuned, by layer a place [T, 2 · kv] with
    keys first. Their positions are the first ones, so that a prefix of zeros is those tokens before the text."""

    tokens: tuple[int, ...]
    places: tuple[slice, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """Where a model uses the flat vector of the whole layout (`whole_layout`): low-rank terms, which are added up, by linear
    module; what gains grow by, by norm module; what is added to biases and to entries of weights, and what follows layers, by
    linear module; what comes before the text. The terms of one number have one rank and one scale in all modules."""

    linears: Mapping[str, tuple[LowRank, ...]] = dataclasses.field(default_factory=dict)
    gains: Mapping[str, slice] = dataclasses.field(default_factory=dict)
    biases: Mapping[str, slice] = dataclasses.field(default_factory=dict)
    bottlenecks: Mapping[str, Bottleneck] = dataclasses.field(default_factory=dict)
    entries: Mapping[str, Entries] = dataclasses.field(default_factory=dict)
    prompt: Prompt | None = None
    prefix: Prefix | None = None

    def modules(self) -> set[str]:
        """All that something is done to."""
        return {*self.linears, *self.gains, *self.biases, *self.bottlenecks, *self.entries}

    @property
    def lowest(self) -> int | None:
        """The lowest layer that is not as in the base; None if none is."""
        if self.prompt is not None or self.prefix is not None:
            return 0
        return min((n for module in self.modules() if (n := layer_number(module)) is not None), default=None)


class Adapter(Protocol):
    """A row of ADAPTERS: frozen, its fields are its config."""

    @property
    def id(self) -> str: ...

    def layout(self, base: Base) -> Layout:
        """The flat order of the tensors that all devices share. Raises SpecError for a base that has nothing to tune here."""

    def personal(self, base: Base) -> Layout | None:
        """Tensors that each device has of its own and never sends; None for none."""

    def initial(self, layout: Layout, seed: int, base: Base | None = None) -> Vector:
        """The start of `layout`, shared or whole, float32 [layout.size]: the model computes as its base.

        Of the whole layout, the shared entries are those of the shared one. The same bits on every machine, but for a row whose
        start follows from the base's weights: it needs `base`, or raises SpecError.
        """

    def placement(self, base: Base) -> Placement:
        """Where the vector of the whole layout enters the model."""

    def narrowed(self, rank: int) -> Adapter:
        """The same adapter on a device that has at most `rank` entries along rank axes; scales are those of the full rank."""


ADAPTERS: Mapping[str, str] = {
    "lora": "edge_client.adapters.low_rank:LoraFactors",
    "lora_sb": "edge_client.adapters.low_rank:LoraCore",
    "biases": "edge_client.adapters.biases:Biases",
    "entries": "edge_client.adapters.entries:WeightEntries",
    "bottleneck": "edge_client.adapters.bottlenecks:Bottlenecks",
    "prompt": "edge_client.adapters.prompts:SoftPrompt",
    "projected_prompt": "edge_client.adapters.prompts:ProjectedPrompt",
    "prefix": "edge_client.adapters.prompts:PrefixKeys",
    "norms": "edge_client.adapters.norms:NormGains",
}


def whole_layout(adapter: Adapter, base: Base) -> Layout:
    """An engine's layout: the shared tensors, then those of the device alone."""
    shared, personal = adapter.layout(base), adapter.personal(base)
    return shared if personal is None else Layout(shared.tensors + personal.tensors)


def _part(place: slice | Vector, vector: Vector, shape: tuple[int, int]) -> Vector:
    return vector[place].reshape(shape) if isinstance(place, slice) else place
