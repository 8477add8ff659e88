"""Layout and Delta: one float32 vector and the names, shapes and roles that give its entries meaning."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from wire import spec
from wire.errors import SpecError

Vector = npt.NDArray[np.float32]
Role = Literal["lora_A", "lora_B", "core", "gain", "history_A", "history_B", "down", "up", "prompt", "bias", "other"]
RANK_AXES: Mapping[Role, tuple[int, ...]] = {
    "lora_A": (0,), "lora_B": (1,), "core": (0, 1), "down": (0,), "up": (1,), "prompt": (0,),
}  # fmt: skip
"""The axes of a tensor that a device of smaller rank (or width, or length) has less of: its first entries along them."""
HISTORY: frozenset[Role] = frozenset({"history_A", "history_B"})
"""Roles of what no device tunes: an aggregator keeps there what earlier rounds came to."""


def layer_number(name: str) -> int | None:
    """The layer that a module or tensor lies in, None outside of layers.

    >>> layer_number("model.layers.12.mlp.up_proj")
    12
    """
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    return numbers[0] if numbers else None


MAX_PARAMETERS = 1 << 28
"""Entries of the largest layout either end accepts (1 GiB of float32)."""
MAX_TENSORS = 20_000


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a layout. `name` is PEFT's parameter name; `role` lets a codec treat factors apart."""

    name: str
    shape: tuple[int, ...]
    role: Role = "other"

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The order in which an adapter's tensors lie in one flat float32 vector (row-major, no padding)."""

    tensors: tuple[Tensor, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.tensors) <= MAX_TENSORS:
            raise ValueError(f"a layout has 1 to {MAX_TENSORS} tensors, not {len(self.tensors)}")
        if any(not t.shape or min(t.shape) < 1 for t in self.tensors):
            raise ValueError("every tensor of a layout needs a shape of positive numbers")
        if len({t.name for t in self.tensors}) != len(self.tensors):
            raise ValueError("two tensors of a layout have one name")
        if self.size > MAX_PARAMETERS:
            raise ValueError(f"a layout has at most {MAX_PARAMETERS} entries, not {self.size}")

    @functools.cached_property
    def size(self) -> int:
        """Entries of the flat vector."""
        return sum(t.size for t in self.tensors)

    @functools.cached_property
    def digest(self) -> str:
        return spec.digest(self)

    def slices(self) -> Iterator[tuple[Tensor, slice]]:
        """Each tensor with its place in the flat vector."""
        start = 0
        for tensor in self.tensors:
            yield tensor, slice(start, start + tensor.size)
            start += tensor.size

    def below(self, count: int) -> Layout:
        """The first `count` tensors. Raises ValueError for none."""
        return Layout(self.tensors[:count])

    def above(self, count: int) -> Layout:
        """The tensors after the first `count`. Raises ValueError for none."""
        return Layout(self.tensors[count:])

    def split(self, vector: Vector) -> dict[str, Vector]:
        """Views of `vector` [size] by name, each in its tensor's shape."""
        if vector.shape != (self.size,):
            raise ValueError(f"expected a vector of {self.size} entries, got shape {vector.shape}")
        return {t.name: vector[place].reshape(t.shape) for t, place in self.slices()}

    @classmethod
    def parse(cls, table: Any) -> Layout:
        """A layout from its plain form. Raises SpecError."""
        try:
            return spec.parse(cls, table, "layout")
        except ValueError as error:
            raise SpecError(f"layout: {error}") from error


@dataclasses.dataclass(frozen=True, eq=False)
class Delta:
    """What local training changed: `vector` is float32 [layout.size]."""

    layout: Layout
    vector: Vector

    def __post_init__(self) -> None:
        if self.vector.shape != (self.layout.size,) or self.vector.dtype != np.float32:
            raise ValueError(f"expected float32 [{self.layout.size}], got {self.vector.dtype} {self.vector.shape}")
