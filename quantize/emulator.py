"""Emulators: a model without some of its layers, of which devices tune the end in the whole one's place (arXiv 2406.17706)."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from quantize.errors import QuantizeError
from quantize.formats import Blocks
from quantize.sources import Array, Source

KEPT = "edgetune_layers"
"""A key of an emulator's config.json: the numbers that its layers have in the whole model."""
LAYER = re.compile(r"(?<=^model\.layers\.)\d+(?=\.)")


def parse(said: str) -> tuple[int, ...]:
    """The layers that `said` lists, such as "0,4,8,24-29". Raises QuantizeError for anything but ascending numbers and ranges.

    >>> parse("0,4,8-10")
    (0, 4, 8, 9, 10)
    """
    found: list[int] = []
    for part in said.split(","):
        first, to, last = part.partition("-")
        if not first.isdigit() or not (last if to else first).isdigit():
            raise QuantizeError(f"--keep-layers {said}: expected numbers and ranges, such as 0,4,8,24-29")
        found += range(int(first), int(last or first) + 1)
    if not found or any(a >= b for a, b in itertools.pairwise(found)):
        raise QuantizeError(f"--keep-layers {said}: the layers must ascend, and there must be some")
    return tuple(found)


class Emulator:
    """A source with the layers `keep` of another, numbered anew from 0. Raises QuantizeError for layers that it does not have."""

    def __init__(self, whole: Source, keep: Sequence[int]) -> None:
        self._whole, self._config = whole, whole.config()
        every = int(self._config["num_hidden_layers"])
        if keep[-1] >= every:
            raise QuantizeError(f"--keep-layers: the model has layers 0 to {every - 1}, not {keep[-1]}")
        self._old = dict(enumerate(keep))
        self._new = {old: new for new, old in self._old.items()}
        self.digest = hashlib.sha256(f"{whole.digest}/{list(keep)}".encode()).hexdigest()

    def config(self) -> dict[str, Any]:
        """The whole model's, with fewer layers; of an emulator of an emulator, KEPT counts in the first model."""
        before = self._config.get(KEPT)
        kept = [before[old] if before else old for old in self._old.values()]
        changed: dict[str, Any] = {"num_hidden_layers": len(kept), KEPT: kept}
        if "layer_types" in self._config:
            changed["layer_types"] = [self._config["layer_types"][old] for old in self._old.values()]
        return self._config | changed

    def side_files(self) -> dict[str, bytes]:
        return self._whole.side_files()

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        named = ((self._renamed(name), shape) for name, shape in self._whole.shapes().items())
        return {name: shape for name, shape in named if name is not None}

    def read(self, name: str) -> Array:
        return self._whole.read(original(name, self._old))

    def blocks(self, name: str) -> Blocks | None:
        return self._whole.blocks(original(name, self._old))

    def _renamed(self, name: str) -> str | None:
        """A tensor's name here, None for one that is left out."""
        found = LAYER.search(name)
        if found is None:
            return name
        new = self._new.get(int(found.group()))
        return None if new is None else LAYER.sub(str(new), name)


def original(name: str, old: Mapping[int, int] | Sequence[int]) -> str:
    """The name in the whole model of an emulator's tensor or module.

    >>> original("model.layers.1.mlp.up_proj", [0, 7])
    'model.layers.7.mlp.up_proj'
    """
    return LAYER.sub(lambda found: str(old[int(found.group())]), name)
