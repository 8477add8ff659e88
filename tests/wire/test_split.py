"""Split updates: scalars below a boundary and a delta above it come back, and garbage is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wire import split
from wire.codecs.chain import codec
from wire.delta import Delta, Layout, Tensor
from wire.errors import PayloadError
from wire.scalars import Directions, Scalars, Step, Trajectory
from wire.split import HEAD, Split

LAYOUT = Layout(tuple(Tensor(f"w{n}", (8, 10), "lora_A") for n in range(5)))
DIRECTIONS = Directions("device", 6, 16)
INT8 = codec("int8")


def made(below: int = 2) -> Split:
    chance = np.random.Generator(np.random.Philox(key=4))
    upper = LAYOUT.above(below)
    delta = Delta(upper, chance.standard_normal(upper.size).astype(np.float32) * np.float32(0.01))
    return Split(LAYOUT, below, Scalars.of(DIRECTIONS, 1e-3 * chance.standard_normal(6)), delta)


def encoded(update: Split) -> bytes:
    return update.encode(INT8, INT8.init(update.delta.layout))[0]


@pytest.mark.parametrize("below", [1, 2, 4])
def test_both_halves_come_back(below: int) -> None:
    sent = made(below)
    payload = encoded(sent)
    found = split.decode(payload, INT8, DIRECTIONS, LAYOUT)
    assert found.below == below and len(payload) <= split.max_bytes(INT8, DIRECTIONS, LAYOUT)
    assert np.array_equal(found.scalars.units, sent.scalars.units)
    assert np.abs(found.delta.vector - sent.delta.vector).max() < 1e-3


def test_below_the_boundary_directions_are_the_first_entries_of_the_runs() -> None:
    update = split.decode(encoded(made(2)), INT8, DIRECTIONS, LAYOUT)
    whole = Trajectory.start(DIRECTIONS, LAYOUT, np.zeros(LAYOUT.size, np.float32), 3)
    moved = whole.delta(Step(((99, update.scalars.units),)))
    vector = update.vector(99, 3)
    assert np.array_equal(vector[:160], moved[:160]) and np.abs(moved[:160]).max() > 0
    assert np.array_equal(vector[160:], update.delta.vector)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_garbage_is_refused_or_is_an_update(data: st.DataObject) -> None:
    payload = bytearray(encoded(made()))
    for _ in range(data.draw(st.integers(1, 3))):
        payload[data.draw(st.integers(0, len(payload) - 1))] = data.draw(st.integers(0, 255))
    for garbage in (bytes(payload), bytes(payload[: data.draw(st.integers(0, len(payload)))])):
        try:
            found = split.decode(garbage, INT8, DIRECTIONS, LAYOUT)
        except PayloadError:
            continue
        assert np.isfinite(found.vector(1, 0)).all()


@pytest.mark.parametrize("below", [0, 5, 2**32 - 1])
def test_a_boundary_outside_of_the_layout_is_refused_by_name(below: int) -> None:
    payload = HEAD.pack(b"ETB1", below, 0) + encoded(made())[HEAD.size :]
    with pytest.raises(PayloadError) as error:
        split.decode(payload, INT8, DIRECTIONS, LAYOUT)
    assert error.value.reason.value == "WRONG_LAYOUT"


def test_the_bytes_are_golden() -> None:
    update = Split(
        LAYOUT,
        4,
        Scalars(DIRECTIONS, np.arange(-3, 3, dtype=np.int32), 20),
        Delta(LAYOUT.above(4), np.linspace(-1, 1, 80, dtype=np.float32)),
    )
    float32 = codec("float32")
    payload, _ = update.encode(float32, {})
    assert payload[:12].hex() == "4554423104000000230000" + "00"
    assert len(payload) == 12 + (23 + 12) + (20 + 320)
