"""Engines: what computes losses and gradients on a device. A method drives an engine through this protocol.

An engine holds one frozen quantized base and one adapter, a flat float32 vector in the run's Layout. It is loaded once
and lives as long as the client does: the base is never loaded twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from edge_client.data import Example
from wire.delta import HISTORY, Layout, Vector

Ids = npt.NDArray[np.int32]
IGNORE = -100
"""The label of a position that has no loss (prompts and padding)."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """One sequence: `ids` int32 [T], and `labels` int32 [T], the id to predict *at* each position or IGNORE.

    Labels are not shifted: position t predicts labels[t + 1], as everywhere in the field.
    """

    ids: Ids
    labels: Ids

    @property
    def targets(self) -> int:
        """How many positions have a loss (the first position can have none)."""
        return int(np.count_nonzero(self.labels[1:] != IGNORE))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """The local optimizer. Its moments start at zero in every round: a device keeps no optimizer state."""

    id: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1):
            raise ValueError("beta1 and beta2 must be at least 0 and below 1")
        if self.weight_decay < 0 or self.epsilon <= 0 or self.clip_norm <= 0:
            raise ValueError("epsilon and clip_norm must be positive, weight_decay not negative")


class Engine(Protocol):
    """Losses, and so zeroth-order training. `load` is the constructor: `ENGINES[...]`.load(base, adapter, layout, ...).

    `gradients` says whether it is a GradEngine, `cuts` whether it is a HybridEngine.
    """

    layout: Layout
    gradients: bool
    cuts: bool

    def tokenize(self, examples: Sequence[Example], length: int) -> list[Tokens]:
        """Examples as sequences of at most `length` tokens; plain texts are packed end to end, dialogues are not."""

    def write(self, vector: Vector) -> None:
        """Set the adapter to `vector`, float32 [layout.size]."""

    def loss(self, sequences: Sequence[Tokens]) -> tuple[float, int]:
        """Summed negative log-likelihood in nats, and the number of targets it is summed over. No gradient."""

    def features(self, sequences: Sequence[Tokens]) -> Vector:
        """What the model makes of each sequence, float32 [N, F]: the mean over its tokens of what enters the first layer
        and of what leaves each, every one of length 1, one after the other."""

    def losses(self, batch: Sequence[Tokens], adapters: Sequence[Vector]) -> npt.NDArray[np.float64]:
        """Mean negative log-likelihood in nats a target of `batch` under each of `adapters`, float64 [K]. The engine's
        own adapter afterwards is unspecified."""


class GradEngine(Engine, Protocol):
    """First-order training beside it."""

    def read(self) -> Vector:
        """A copy of the adapter, float32 [layout.size]."""

    def start(self, optimizer: Optimizer, chosen: Sequence[int] | None = None) -> None:
        """Forget all optimizer state; the next `step` is the first. Steps tune the tensors of these numbers in the layout
        alone; None: all but what is history."""

    def step(self, batch: Sequence[Tokens], learning_rate: float) -> float:
        """One optimizer step on the mean loss of `batch`; returns that loss in nats. Raises MachineError if not finite."""


class HybridEngine(GradEngine, Protocol):
    """Gradients for the upper layers, losses for the lower ones: what hybrid order needs."""

    def start_above(self, optimizer: Optimizer, layers: int | None, batch: int, length: int) -> int:
        """As `start`, but until the next `start` steps tune the last `layers` layers alone; None: as many as the memory allows
        for steps of `batch` sequences of `length` tokens. How many of the layout's tensors lie below the cut: 0 if none do.
        Raises MachineError if not even one layer fits, SpecError for an adapter whose tensors are not in the layers' order."""

    def share_below(self) -> float:
        """The layers below the cut, as a share of all."""

    def surrogates(self, adapters: Sequence[Vector]) -> npt.NDArray[np.float64]:
        """For the batch of the last `step`, float64 [K]: the loss's derivative by what enters the first layer above the cut,
        times what enters under each of `adapters`, float32 [entries below]. Differences are differences of the loss, to
        first order. The adapter below the cut is unspecified afterwards."""

    def write_below(self, vector: Vector) -> None:
        """Set the entries below the cut."""


ENGINES: Mapping[str, str] = {
    "onnx": "edge_client.engines.onnx_engine:OnnxEngine",
    "split": "edge_client.engines.split_engine:SplitEngine",
    "torch": "edge_client.engines.torch_engine:TorchEngine",
    "toy": "edge_client.engines.toy:ToyEngine",
}
"""Engine id -> class; `layout` is the adapter's whole one. Each has `load(base, adapter, layout, max_memory)` and
`missing() -> str | None`."""
BROUGHT_BY: Mapping[str, str] = {"split": "torch"}
"""The extra that brings an engine, where it has another name."""


def unit(means: Vector) -> Vector:
    """Each layer's mean, of [..., layers, D], at length 1 and all in a row, so that the late layers do not drown the early."""
    lengths = np.linalg.norm(means, axis=-1, keepdims=True)
    made: Vector = means / np.maximum(lengths, np.finfo(np.float32).tiny)
    return made.reshape(*means.shape[:-2], -1)


def tuned_numbers(layout: Layout, chosen: Sequence[int] | None = None) -> list[int]:
    """The numbers of the tensors that steps tune: `chosen`, or all but what is history. Raises ValueError for none."""
    found = [number for number, tensor in enumerate(layout.tensors) if tensor.role not in HISTORY]
    found = found if chosen is None else sorted(chosen)
    if not found:
        raise ValueError("no tensor to tune")
    return found
