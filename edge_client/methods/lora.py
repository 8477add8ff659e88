"""`lora`: low-rank adapters by backpropagation (arXiv 2106.09685), on a quantized base QLoRA (arXiv 2305.14314)."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal

import numpy as np

from edge_client.engines import Adapter, Base, GradEngine, Optimizer, Tokens
from edge_client.methods import Progress, Trained
from wire.delta import Delta, Layout, Tensor, Vector
from wire.errors import SpecError

ALL = "all-linear"


@dataclasses.dataclass(frozen=True)
class Lora:
    """Per round: `local_steps` optimizer steps of `batch` sequences of at most `sequence_length` tokens.

    `targets` are module names or their last parts ("q_proj"), or "all-linear". Both factors are tuned and averaged.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] | str = ALL
    local_steps: int = 8
    batch: int = 4
    sequence_length: int = 128
    learning_rate: float = 1e-3
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    optimizer: Optimizer = Optimizer()
    id: ClassVar[str] = "lora"

    def __post_init__(self) -> None:
        _between("rank", self.rank, 1, 1024)
        _between("local_steps", self.local_steps, 1, 1_000_000)
        _between("batch", self.batch, 1, 4096)
        _between("sequence_length", self.sequence_length, 2, 1 << 17)
        _between("warmup_steps", self.warmup_steps, 0, self.local_steps)
        if self.alpha <= 0 or self.learning_rate <= 0:
            raise ValueError("alpha and learning_rate must be positive")
        if (isinstance(self.targets, str) and self.targets != ALL) or not self.targets:
            raise ValueError(f"targets must be {ALL!r} or a list of module names")

    def adapter(self, base: Base) -> Adapter:
        modules = tuple(base.linears())
        if self.targets == ALL:
            return Adapter(self.rank, self.alpha, modules)
        for target in self.targets:
            if not any(_matches(module, target) for module in modules):
                kinds = sorted({module.rsplit(".", 1)[-1] for module in modules})
                raise SpecError(f"method.targets: no module {target!r} in this base; it has {', '.join(kinds)}")
        return Adapter(self.rank, self.alpha, tuple(m for m in modules if any(_matches(m, t) for t in self.targets)))

    def layout(self, base: Base) -> Layout:
        shapes = base.linears()
        return Layout(tuple(t for module in self.adapter(base).targets for t in self._factors(module, *shapes[module])))

    def _factors(self, module: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        stem = f"base_model.model.{module}"
        return (
            Tensor(f"{stem}.lora_A.weight", (self.rank, columns), "lora_A"),
            Tensor(f"{stem}.lora_B.weight", (rows, self.rank), "lora_B"),
        )

    def initial(self, layout: Layout, seed: int) -> Vector:
        """A uniform in ±1/sqrt(columns), B zero: the adapter starts as nothing, and the bits are Philox's own."""
        stream = np.random.Philox(key=seed)
        adapter = np.zeros(layout.size, np.float32)
        for tensor, place in layout.slices():
            if tensor.role == "lora_A":
                raw = (stream.random_raw(tensor.size) >> np.uint64(40)).astype(np.float32)  # 24 bits: exact in float32
                adapter[place] = (raw * np.float32(2.0**-23) - np.float32(1)) * np.float32(
                    1 / math.sqrt(tensor.shape[1])
                )
        return adapter

    def train(
        self, engine: GradEngine, start: Vector, train: Sequence[Tokens], seed: int, progress: Progress | None = None
    ) -> Trained:
        engine.write(start)
        engine.start(self.optimizer)
        losses, tokens, began = [], 0, time.perf_counter()
        for number, batch in enumerate(self._batches(train, seed)):
            losses.append(engine.step(batch, self._rate(number)))
            tokens += sum(len(sequence.ids) for sequence in batch)
            if progress is not None:
                progress(number + 1, self.local_steps, losses[-1])
        seconds = time.perf_counter() - began
        delta = Delta(engine.layout, engine.read() - start)
        return Trained(delta, sum(losses) / len(losses), self.local_steps, tokens, seconds)

    def _batches(self, train: Sequence[Tokens], seed: int) -> Iterator[list[Tokens]]:
        """`local_steps` batches; every sequence once before any comes again."""
        chance = np.random.Generator(np.random.Philox(key=seed))
        waiting: list[int] = []
        for _ in range(self.local_steps):
            while len(waiting) < self.batch:
                waiting += chance.permutation(len(train)).tolist()
            yield [train[i] for i in waiting[: self.batch]]
            del waiting[: self.batch]

    def _rate(self, number: int) -> float:
        """The learning rate of local step `number`, counted from 0."""
        if number < self.warmup_steps:
            return self.learning_rate * (number + 1) / self.warmup_steps
        done = (number - self.warmup_steps) / max(1, self.local_steps - self.warmup_steps)
        factors = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
        return self.learning_rate * factors[self.schedule]


def _between(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must lie between {low} and {high}")


def _matches(module: str, target: str) -> bool:
    return module == target or module.endswith("." + target)
