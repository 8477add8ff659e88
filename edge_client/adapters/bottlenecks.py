"""`bottleneck`: small layers after attention and after the feed-forward part (Houlsby et al., arXiv 1902.00751), as they are
tuned in FedAdapter (arXiv 2205.10162)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from edge_client.adapters import Base, Bottleneck, Placement
from edge_client.adapters.low_rank import last_layers, uniform
from wire.delta import Layout, Tensor, Vector
from wire.errors import SpecError

AFTER = ("self_attn.o_proj", "mlp.down_proj")


@dataclasses.dataclass(frozen=True)
class Bottlenecks:
    """What leaves attention and the feed-forward part, y, becomes y + up · gelu(down · y), with `down` [width, D] and `up`
    [D, width]. `layers`: only the last ones; below them nothing has a gradient."""

    width: int = 16
    layers: int | None = None
    id: ClassVar[str] = "bottleneck"

    def __post_init__(self) -> None:
        if not 1 <= self.width <= 4096:
            raise ValueError("width must lie between 1 and 4096")
        if self.layers is not None and self.layers < 1:
            raise ValueError("layers must be at least 1")

    def narrowed(self, rank: int) -> Bottlenecks:
        return dataclasses.replace(self, width=min(rank, self.width))

    def layout(self, base: Base) -> Layout:
        modules = {m: rows for m, (rows, _) in last_layers(base.linears(), self.layers).items() if m.endswith(AFTER)}
        if not modules:
            raise SpecError("bottleneck: this base has no attention and no feed-forward part to follow")
        return Layout(tuple(t for module, rows in modules.items() for t in self._tensors(module, rows)))

    def _tensors(self, module: str, rows: int) -> tuple[Tensor, Tensor]:
        return (
            Tensor(f"{module}.down.weight", (self.width, rows), "down"),
            Tensor(f"{module}.up.weight", (rows, self.width), "up"),
        )

    def personal(self, base: Base) -> Layout | None:
        return None

    def initial(self, layout: Layout, seed: int, base: Base | None = None) -> Vector:
        """`down` uniform in ±1/sqrt(D), `up` zero, from Philox's own bits."""
        stream = np.random.Philox(key=seed)
        adapter = np.zeros(layout.size, np.float32)
        for tensor, place in layout.slices():
            if tensor.role == "down":
                adapter[place] = uniform(stream, *tensor.shape).reshape(-1)
        return adapter

    def placement(self, base: Base) -> Placement:
        places = {tensor.name: place for tensor, place in self.layout(base).slices()}
        modules = [name.removesuffix(".down.weight") for name in places if name.endswith(".down.weight")]
        return Placement(
            bottlenecks={
                m: Bottleneck(self.width, places[f"{m}.down.weight"], places[f"{m}.up.weight"]) for m in modules
            }
        )
