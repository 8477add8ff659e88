"""`biases`: what is added to the biases of the linear layers (BitFit, arXiv 2106.10199), for bases that have any."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from edge_client.adapters import Base, Placement
from edge_client.adapters.low_rank import last_layers
from wire.delta import Layout, Tensor, Vector
from wire.errors import SpecError


@dataclasses.dataclass(frozen=True)
class Biases:
    """Each bias b becomes b + tuned. `layers`: only the last ones."""

    layers: int | None = None
    id: ClassVar[str] = "biases"

    def __post_init__(self) -> None:
        if self.layers is not None and self.layers < 1:
            raise ValueError("layers must be at least 1")

    def narrowed(self, rank: int) -> Biases:
        return self

    def layout(self, base: Base) -> Layout:
        widths = base.biases()
        if not widths:
            raise SpecError("biases: this base has none, as Llama's and SmolLM2's layers; tune norms")
        modules = [m for m in last_layers(base.linears(), self.layers) if m in widths]
        return Layout(tuple(Tensor(f"{module}.bias", (widths[module],), "bias") for module in modules))

    def personal(self, base: Base) -> Layout | None:
        return None

    def initial(self, layout: Layout, seed: int, base: Base | None = None) -> Vector:
        return np.zeros(layout.size, np.float32)

    def placement(self, base: Base) -> Placement:
        return Placement(
            biases={tensor.name.removesuffix(".bias"): place for tensor, place in self.layout(base).slices()}
        )
