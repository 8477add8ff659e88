"""Where a model is cut in two: gradients above, losses alone below. Without torch, so that a doctor can say it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from wire.delta import Layout, layer_number
from wire.errors import SpecError


@dataclasses.dataclass(frozen=True)
class Cut:
    """`layer`: the first one above. `tensors`: how many of the layout's lie below."""

    layer: int
    tensors: int


WHOLE = Cut(0, 0)


def lowest(layout: Layout, tuned: Sequence[int], layers: int) -> int:
    """The lowest layer with a tensor of the numbers `tuned`; the last one, if they all lie outside of layers."""
    numbers = [layer_number(layout.tensors[number].name) for number in tuned]
    return min((number for number in numbers if number is not None), default=layers - 1)


def at(layout: Layout, layer: int, layers: int) -> Cut:
    """The cut before `layer`. Without a tensor below there is nothing to cut off; a tensor outside of layers is above.

    Raises SpecError if the layout's order is not the layers'.
    """
    numbers = [layer_number(tensor.name) for tensor in layout.tensors]
    lies_above = [number is None or number >= layer for number in numbers]
    below = lies_above.index(True) if any(lies_above) else len(lies_above)
    if not all(lies_above[below:]):
        raise SpecError("hybrid: this adapter's tensors do not lie in the layers' order")
    if below == len(lies_above):
        raise SpecError(f"hybrid: this adapter tunes nothing in the last {layers - layer} layers")
    return Cut(layer, below) if below else WHOLE
