"""The toy engine: a byte bigram model in numpy. Everything but the language model is real, and it starts at once.

For tests, for measuring rounds without training, and as the shortest complete example of an engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from edge_client.data import Example
from edge_client.engines import IGNORE, Adapter, Optimizer, Tokens
from edge_client.engines.sequences import answered, packed
from wire import spec
from wire.delta import Layout, Vector
from wire.errors import MachineError

BYTES = 256
END = 0
Ids = npt.NDArray[np.int64]
Matrix = npt.NDArray[np.float32]


class ToyBase:
    """A frozen base that finds every byte equally likely: one linear layer of zeros, 256 x 256."""

    @property
    def identity(self) -> str:
        return spec.digest({"base": "toy", "version": 1})

    def linears(self) -> Mapping[str, tuple[int, int]]:
        return {"bigram": (BYTES, BYTES)}


class ToyEngine:
    """P(next | byte) = softmax(scale * B A[:, byte]); exact gradients, AdamW or SGD."""

    def __init__(self, adapter: Adapter, layout: Layout) -> None:
        self.layout = layout
        self._scale = np.float32(adapter.alpha / adapter.rank)
        self._vector = np.zeros(layout.size, np.float32)
        self._rank = adapter.rank
        self.start(Optimizer())

    @classmethod
    def load(
        cls, base: ToyBase, adapter: Adapter, layout: Layout, max_memory: int | None = None, threads: int | None = None
    ) -> ToyEngine:
        """Needs 5,120 floats and no threads, whatever is allowed."""
        return cls(adapter, layout)

    @classmethod
    def missing(cls) -> str | None:
        return None

    def tokenize(self, examples: Sequence[Example], length: int) -> list[Tokens]:
        texts = packed([list(e.text.encode()) for e in examples if e.text], END, length)
        dialogues = [answered(_turns(e), length) for e in examples if e.messages]
        return texts + [tokens for tokens in dialogues if tokens is not None]

    def write(self, vector: Vector) -> None:
        self._vector = vector.astype(np.float32, copy=True)

    def read(self) -> Vector:
        return self._vector.copy()

    def loss(self, sequences: Sequence[Tokens]) -> tuple[float, int]:
        given, wanted = _pairs(sequences)
        logits = self._hidden(given) @ self._b().T * self._scale
        return float(_nll(logits, wanted).sum(dtype=np.float64)), len(wanted)

    def start(self, optimizer: Optimizer) -> None:
        self._optimizer, self._steps = optimizer, 0
        self._mean, self._square = np.zeros_like(self._vector), np.zeros_like(self._vector)

    def step(self, batch: Sequence[Tokens], learning_rate: float) -> float:
        loss, gradient = self._gradient(batch)
        if not (math.isfinite(loss) and np.isfinite(gradient).all()):
            raise MachineError("the training loss is not finite; lower the run's learning_rate")
        self._update(clipped(gradient, self._optimizer.clip_norm), np.float32(learning_rate))
        return loss

    def _update(self, gradient: Vector, rate: np.float32) -> None:
        o = self._optimizer
        self._steps += 1
        self._vector *= np.float32(1 - rate * o.weight_decay)
        if o.id == "sgd":
            self._vector -= rate * gradient
            return
        self._mean = np.float32(o.beta1) * self._mean + np.float32(1 - o.beta1) * gradient
        self._square = np.float32(o.beta2) * self._square + np.float32(1 - o.beta2) * gradient**2
        mean = self._mean / np.float32(1 - o.beta1**self._steps)
        root = np.sqrt(self._square / np.float32(1 - o.beta2**self._steps))
        self._vector -= rate * mean / (root + np.float32(o.epsilon))

    def _gradient(self, batch: Sequence[Tokens]) -> tuple[float, Vector]:
        given, wanted = _pairs(batch)
        hidden = self._hidden(given)
        logits = hidden @ self._b().T * self._scale
        loss = float(_nll(logits, wanted).mean())
        errors = _softmax(logits)
        errors[np.arange(len(wanted)), wanted] -= 1
        errors *= self._scale / len(wanted)
        a = np.zeros((BYTES, self._rank), np.float32)
        np.add.at(a, given, errors @ self._b())
        return loss, np.concatenate([a.T.reshape(-1), (errors.T @ hidden).reshape(-1)])

    def _a(self) -> Matrix:
        return self._vector[: self._rank * BYTES].reshape(self._rank, BYTES)

    def _b(self) -> Matrix:
        return self._vector[self._rank * BYTES :].reshape(BYTES, self._rank)

    def _hidden(self, given: Ids) -> Matrix:
        return np.ascontiguousarray(self._a()[:, given].T)


def clipped(gradient: Vector, norm: float) -> Vector:
    """`gradient` [n], shortened to `norm` if it is longer."""
    length = float(np.linalg.norm(gradient))
    return gradient if length <= norm else gradient * np.float32(norm / length)


def _turns(example: Example) -> list[tuple[list[int], bool]]:
    return [(list(f"{m.content}\n".encode()), m.role == "assistant") for m in example.messages]


def _pairs(sequences: Sequence[Tokens]) -> tuple[Ids, Ids]:
    """(byte, next byte) wherever there is a target, int64 [N] each."""
    given = np.concatenate([s.ids[:-1] for s in sequences]).astype(np.int64)
    wanted = np.concatenate([s.labels[1:] for s in sequences]).astype(np.int64)
    there = wanted != IGNORE
    return given[there], wanted[there]


def _softmax(logits: Matrix) -> Matrix:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    normal: Matrix = raised / raised.sum(axis=1, keepdims=True)
    return normal


def _nll(logits: Matrix, wanted: Ids) -> Matrix:
    """Negative log-likelihood in nats, float32 [N]."""
    top = logits.max(axis=1)
    log_sum = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    losses: Matrix = log_sum - logits[np.arange(len(wanted)), wanted]
    return losses
