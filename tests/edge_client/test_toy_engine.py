from __future__ import annotations

import numpy as np
import pytest

from edge_client.engines import IGNORE, Optimizer, Tokens
from edge_client.engines.toy import ToyBase, ToyEngine, clipped
from edge_client.methods.lora import Lora
from wire.errors import MachineError

METHOD = Lora(rank=3, alpha=6.0)
ONE = [Tokens(np.array([3, 4, 4, 9], np.int32), np.array([3, IGNORE, 4, 9], np.int32))]


def engine() -> ToyEngine:
    base = ToyBase()
    return ToyEngine.load(base, METHOD.tunes(), METHOD.tunes().layout(base))


def test_without_an_adapter_every_byte_is_equally_likely() -> None:
    toy = engine()
    toy.write(METHOD.tunes().initial(toy.layout, 0))
    total, count = toy.loss(ONE)
    assert count == 2
    assert total == pytest.approx(2 * np.log(256))


def test_the_gradient_is_that_of_finite_differences() -> None:
    toy = engine()
    chance = np.random.Generator(np.random.Philox(key=2))
    at = chance.standard_normal(toy.layout.size, np.float32) * np.float32(0.3)
    toy.write(at)
    _, gradient = toy._gradient(ONE)
    for i in np.argsort(-np.abs(gradient))[:20]:
        nudged = []
        for step in (1e-2, -1e-2):
            moved = at.copy()
            moved[i] += step
            toy.write(moved)
            nudged.append(toy.loss(ONE)[0] / 2)
        assert (nudged[0] - nudged[1]) / 2e-2 == pytest.approx(gradient[i], rel=2e-2, abs=2e-4)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_steps_are_those_of_torch(kind: str) -> None:
    import torch

    toy = engine()
    toy.write(METHOD.tunes().initial(toy.layout, 3))
    weights = torch.nn.Parameter(torch.from_numpy(toy.read()))
    adamw = torch.optim.AdamW([weights], lr=0.05, weight_decay=0.01)
    theirs = adamw if kind == "adamw" else torch.optim.SGD([weights], lr=0.05)
    toy.start(Optimizer(id=kind, weight_decay=0.01 if kind == "adamw" else 0.0, clip_norm=1e9))  # type: ignore[arg-type]
    for _ in range(3):
        toy.write(weights.detach().numpy())
        _, gradient = toy._gradient(ONE)
        weights.grad = torch.from_numpy(gradient)
        theirs.step()
        toy.step(ONE, 0.05)
        np.testing.assert_allclose(toy.read(), weights.detach().numpy(), rtol=1e-4, atol=1e-6)


def test_a_long_gradient_is_shortened_and_a_short_one_is_left() -> None:
    long = np.array([3.0, 4.0], np.float32)
    assert np.linalg.norm(clipped(long, 1.0)) == pytest.approx(1.0)
    assert clipped(long, 6.0) is long


def test_training_that_diverges_is_said() -> None:
    toy = engine()
    toy.write(np.full(toy.layout.size, np.inf, np.float32))
    with np.errstate(all="ignore"), pytest.raises(MachineError, match="not finite"):
        toy.step(ONE, 0.1)
