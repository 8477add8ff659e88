"""Adapters: what is tuned. A row says which tensors lie in the flat vector, how they start, and where the model uses them.

How it is tuned is a method's matter: every method works on every adapter, through one flat float32 vector.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from wire.delta import Layout, Vector


class Base(Protocol):
    """A frozen base as adapters and engines see it; `quantize.QuantizedBase` is one."""

    @property
    def identity(self) -> str: ...

    def linears(self) -> Mapping[str, tuple[int, int]]:
        """Module name -> (out, in) of every linear layer an adapter may stand on, in the model's order."""

    def norms(self) -> Mapping[str, int]:
        """Module name -> width of every norm with a gain, in the model's order."""

    def dequantized(self, name: str) -> Any:
        """A tensor as float32."""


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """One linear layer's share: y += scale · b · core · a · x. Each part is a place in the flat vector, or fixed float32.

    `a` [rank, in], `b` [out, rank], `core` [rank, rank] or None for none.
    """

    a: slice | Vector
    b: slice | Vector
    core: slice | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Placement:
    """Where a model uses the flat vector: low-rank terms by linear module, and what is added to gains by norm module."""

    rank: int
    scale: float
    linears: Mapping[str, LowRank]
    gains: Mapping[str, slice]


class Adapter(Protocol):
    """A row of ADAPTERS: frozen, its fields are its config."""

    @property
    def id(self) -> str: ...

    def layout(self, base: Base) -> Layout:
        """The flat order of the tuned tensors. Raises SpecError for a base that has nothing to tune here."""

    def initial(self, layout: Layout, seed: int) -> Vector:
        """The adapter of release 0, float32 [layout.size]: the same bits on every machine. The model computes as its base."""

    def placement(self, base: Base) -> Placement:
        """Where `layout(base)` enters the model."""


ADAPTERS: Mapping[str, str] = {
    "lora": "edge_client.adapters.low_rank:LoraFactors",
    "lora_sb": "edge_client.adapters.low_rank:LoraCore",
    "norms": "edge_client.adapters.norms:NormGains",
}


def parts(place: slice | Vector | None, vector: Vector, shape: tuple[int, int]) -> Any:
    """A part of a LowRank as an array: its place in `vector`, or the fixed array itself."""
    return vector[place].reshape(shape) if isinstance(place, slice) else place
