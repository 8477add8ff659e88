"""Server optimizers: the mean delta as a pseudo-gradient (arXiv 2003.00295). All arithmetic is float32, entry by entry."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np

from wire.delta import Vector


def _positive(**rates: float) -> None:
    for name, rate in rates.items():
        if rate <= 0:
            raise ValueError(f"{name} must be positive")


def _fraction(**rates: float) -> None:
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"{name} must lie in [0, 1)")


@dataclasses.dataclass(frozen=True)
class Average:
    """learning_rate · delta: plain FedAvg at 1."""

    learning_rate: float = 1.0
    id: ClassVar[str] = "average"

    def __post_init__(self) -> None:
        _positive(learning_rate=self.learning_rate)

    def state_size(self, size: int) -> int:
        return 0

    def step(self, delta: Vector, state: Vector) -> tuple[Vector, Vector]:
        return np.float32(self.learning_rate) * delta, state


@dataclasses.dataclass(frozen=True)
class Momentum:
    """FedAvgM (arXiv 1909.06335); with `nesterov`, the outer step of DiLoCo (arXiv 2311.08105)."""

    learning_rate: float = 0.7
    momentum: float = 0.9
    nesterov: bool = True
    id: ClassVar[str] = "momentum"

    def __post_init__(self) -> None:
        _positive(learning_rate=self.learning_rate)
        _fraction(momentum=self.momentum)

    def state_size(self, size: int) -> int:
        return size

    def step(self, delta: Vector, state: Vector) -> tuple[Vector, Vector]:
        velocity = np.float32(self.momentum) * state + delta
        ahead = delta + np.float32(self.momentum) * velocity if self.nesterov else velocity
        return np.float32(self.learning_rate) * ahead, velocity


@dataclasses.dataclass(frozen=True)
class Adam:
    """FedAdam, without bias correction as in its paper; `epsilon` is the paper's τ. State: first, then second moment."""

    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-3
    id: ClassVar[str] = "adam"

    def __post_init__(self) -> None:
        _positive(learning_rate=self.learning_rate, epsilon=self.epsilon)
        _fraction(beta1=self.beta1, beta2=self.beta2)

    def state_size(self, size: int) -> int:
        return 2 * size

    def step(self, delta: Vector, state: Vector) -> tuple[Vector, Vector]:
        first: Vector
        second: Vector
        first, second = np.split(state, 2)
        first = np.float32(self.beta1) * first + np.float32(1 - self.beta1) * delta
        second = np.float32(self.beta2) * second + np.float32(1 - self.beta2) * delta * delta
        ratio: Vector = np.divide(first, np.sqrt(second) + np.float32(self.epsilon), dtype=np.float32)
        return np.float32(self.learning_rate) * ratio, np.concatenate([first, second])
