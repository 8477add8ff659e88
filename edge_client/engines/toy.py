"""The toy engine: a byte bigram model in numpy. Everything but the language model is real, and it starts at once.

For tests, for measuring rounds without training, and as the shortest complete example of an engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from edge_client.adapters import Adapter, LowRank
from edge_client.data import Example
from edge_client.engines import IGNORE, Optimizer, Tokens, tuned_numbers, unit
from edge_client.engines.sequences import answered, packed
from wire import spec
from wire.delta import Layout, Vector
from wire.errors import MachineError, SpecError

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

    def norms(self) -> Mapping[str, int]:
        return {}

    def biases(self) -> Mapping[str, int]:
        return {}

    def embedding(self) -> tuple[int, int]:
        return 0, 0

    def embeddings(self, tokens: Sequence[int]) -> Matrix:
        raise SpecError("the toy base has no embedding")

    def dequantized(self, name: str) -> Matrix:
        return np.zeros((BYTES, BYTES), np.float32)


class ToyEngine:
    """P(next | byte) = softmax(scale * B A[:, byte]); exact gradients, AdamW or SGD."""

    gradients = True
    cuts = False

    def __init__(self, base: ToyBase, adapter: Adapter, layout: Layout) -> None:
        self.layout = layout
        linears = adapter.placement(base).linears
        if not linears:
            raise SpecError("the toy engine tunes low-rank factors alone: lora or lora_sb")
        self._terms = linears["bigram"]
        self._vector = np.zeros(layout.size, np.float32)
        self.start(Optimizer())

    @classmethod
    def load(
        cls, base: ToyBase, adapter: Adapter, layout: Layout, max_memory: int | None = None, threads: int | None = None
    ) -> ToyEngine:
        """Needs 5,120 floats and no threads, whatever is allowed."""
        return cls(base, adapter, layout)

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
        logits = self._logits(given, self._factors())
        return float(_nll(logits, wanted).sum(dtype=np.float64)), len(wanted)

    def features(self, sequences: Sequence[Tokens]) -> Vector:
        """Its one layer is given bytes: how often each occurs."""
        return np.stack([unit(np.bincount(s.ids, minlength=BYTES)[None].astype(np.float32)) for s in sequences])

    def losses(self, batch: Sequence[Tokens], adapters: Sequence[Vector]) -> npt.NDArray[np.float64]:
        found = []
        for adapter in adapters:
            self.write(adapter)
            total, count = self.loss(batch)
            found.append(total / count)
        return np.array(found)

    def start(self, optimizer: Optimizer, chosen: Sequence[int] | None = None) -> None:
        self._optimizer, self._steps = optimizer, 0
        self._mean, self._square = np.zeros_like(self._vector), np.zeros_like(self._vector)
        self._fixed = np.ones(self.layout.size, bool)
        places = [place for _, place in self.layout.slices()]
        for number in tuned_numbers(self.layout, chosen):
            self._fixed[places[number]] = False

    def step(self, batch: Sequence[Tokens], learning_rate: float) -> float:
        loss, gradient = self._gradient(batch)
        if not (math.isfinite(loss) and np.isfinite(gradient).all()):
            raise MachineError("the training loss is not finite; lower the run's learning_rate")
        gradient[self._fixed] = 0
        kept = self._vector[self._fixed]
        self._update(clipped(gradient, self._optimizer.clip_norm), np.float32(learning_rate))
        self._vector[self._fixed] = kept
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
        factors = self._factors()
        logits = self._logits(given, factors)
        loss = float(_nll(logits, wanted).mean())
        errors = _softmaxed(logits)
        errors[np.arange(len(wanted)), wanted] -= 1
        gradient = np.zeros_like(self._vector)
        for term, (a, b) in zip(self._terms, factors, strict=True):
            scaled: Matrix = errors * np.float32(np.float32(term.scale) / len(wanted))
            down = np.zeros((BYTES, term.rank), np.float32)
            np.add.at(down, given, scaled @ b)
            _fill(gradient, term, down.T, scaled.T @ _entering(a, given))
        return loss, gradient

    def _factors(self) -> list[tuple[Matrix, Matrix]]:
        return [term.factors(self._vector, BYTES, BYTES) for term in self._terms]

    def _logits(self, given: Ids, factors: Sequence[tuple[Matrix, Matrix]]) -> Matrix:
        logits = np.zeros((len(given), BYTES), np.float32)
        for term, (a, b) in zip(self._terms, factors, strict=True):
            logits += (_entering(a, given) @ b.T) * np.float32(term.scale)
        return logits


def _entering(a: Matrix, given: Ids) -> Matrix:
    """A x of each byte, float32 [N, rank]."""
    return np.ascontiguousarray(a[:, given].T)


def _fill(gradient: Vector, term: LowRank, to_a: Matrix, to_b: Matrix) -> None:
    """The gradient of a term's parts in the layout's order, from those of its factors [rank, 256] and [256, rank]."""
    if term.core is not None:
        assert not isinstance(term.a, slice), "a core stands between fixed factors"
        gradient[term.core] = (to_a @ term.a.T).reshape(-1)
    if isinstance(term.a, slice):
        gradient[term.a] = to_a.reshape(-1)
    if isinstance(term.b, slice):
        gradient[term.b] = to_b.reshape(-1)


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


def _softmaxed(logits: Matrix) -> Matrix:
    """In the place of the logits: of all that a step makes, they alone are large."""
    logits -= logits.max(axis=1, keepdims=True)
    np.exp(logits, out=logits)
    logits /= logits.sum(axis=1, keepdims=True)
    return logits


def _nll(logits: Matrix, wanted: Ids) -> Matrix:
    """Negative log-likelihood in nats, float32 [N]."""
    top = logits.max(axis=1)
    shifted = logits - top[:, None]
    log_sum = top + np.log(np.exp(shifted, out=shifted).sum(axis=1))
    losses: Matrix = log_sum - logits[np.arange(len(wanted)), wanted]
    return losses
