"""`norms`: the gains of the RMS norms, 35,136 numbers of SmolLM2-135M (norm tuning, arXiv 2312.11420)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from edge_client.adapters import Base, Placement
from wire.delta import Layout, Tensor, Vector, layer_number
from wire.errors import SpecError


@dataclasses.dataclass(frozen=True)
class NormGains:
    """Each gain g becomes g · (1 + tuned): one step size fits small gains and large ones. `layers`: only the last ones,
    and the model's final norm."""

    layers: int | None = None
    id: ClassVar[str] = "norms"

    def __post_init__(self) -> None:
        if self.layers is not None and self.layers < 1:
            raise ValueError("layers must be at least 1")

    def narrowed(self, rank: int) -> NormGains:
        return self

    def layout(self, base: Base) -> Layout:
        widths = base.norms()
        if not widths:
            raise SpecError("this base has no norms to tune")
        numbers = {module: layer_number(module) for module in widths}
        last = 1 + max((n for n in numbers.values() if n is not None), default=0)
        first = 0 if self.layers is None else last - self.layers
        kept = [module for module, number in numbers.items() if number is None or number >= first]
        return Layout(tuple(Tensor(f"{module}.gain", (widths[module],), "gain") for module in kept))

    def personal(self, base: Base) -> Layout | None:
        return None

    def initial(self, layout: Layout, seed: int, base: Base | None = None) -> Vector:
        return np.zeros(layout.size, np.float32)

    def placement(self, base: Base) -> Placement:
        places = {tensor.name.removesuffix(".gain"): place for tensor, place in self.layout(base).slices()}
        return Placement(gains=places)
