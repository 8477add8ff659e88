"""Error feedback: what the inner stages lose is kept on the device and sent with the next update (arXiv 1901.09847)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import ClassVar, Literal

import numpy as np

from wire.codecs import Fields, Shape, Stage, State, series
from wire.codecs.kernels import Ints
from wire.delta import Vector
from wire.spec import Plain


@dataclasses.dataclass(frozen=True)
class ErrorFeedback:
    """Wraps lossy `inner` field stages. Decoded + new residual = input + `decay` * old residual, entry by entry.

    State: `residual` float32 [n]. A decay below 1 forgets what is old, for devices that take part rarely.
    """

    inner: tuple[Plain, ...]
    decay: float = 1.0
    id: ClassVar[str] = "error_feedback"
    kind: ClassVar[Literal["fields"]] = "fields"

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay <= 1.0:
            raise ValueError("decay must lie between 0 and 1")
        if not self.stages or any(stage.kind != "fields" for stage in self.stages):
            raise ValueError("inner must list one or more field stages")

    @functools.cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The inner stages."""
        return series.build(self.inner, "error_feedback.inner")

    def emits(self, like: Shape) -> Shape:
        emitted: Shape = series.shapes(self.stages, like)[-1]
        return emitted

    def init(self, like: Shape) -> State:
        return {"residual": np.zeros(like["values"].length, np.float32), **series.init(self.stages, like)}

    def encode(self, x: Fields, state: State, like: Shape) -> tuple[Fields, State]:
        wanted = x["values"] + np.float32(self.decay) * state["residual"]
        inner_state = {key: value for key, value in state.items() if key != "residual"}
        sent, following = series.encode(self.stages, x | {"values": wanted}, inner_state, like)
        arrived = self.decode(sent, like)["values"]
        return sent, {"residual": wanted - arrived, **following}

    def parts(self, y: Fields, like: Shape) -> Iterator[Vector] | None:
        """As `series.parts`."""
        return series.parts(self.stages, y, like)

    def add(self, y: Fields, like: Shape, total: Ints, fraction_bits: int, weight: int) -> bool:
        """As `series.add`."""
        return series.add(self.stages, y, like, total, fraction_bits, weight)

    def decode(self, y: Fields, like: Shape) -> Fields:
        fields: Fields = series.decode(self.stages, y, like)
        return fields
