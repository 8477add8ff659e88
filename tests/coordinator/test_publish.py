"""Combining a buffer: who counts what, along whose directions, and that anybody finds the same again."""

from __future__ import annotations

import dataclasses
import random
import tracemalloc
from typing import Any

import numpy as np
import pytest

from coordinator import ingest, publish
from coordinator.rules import Rules
from coordinator.stores.memory import MemoryBlobs
from wire import run_spec, spec
from wire.delta import Delta, Layout, Tensor
from wire.errors import PayloadError
from wire.messages import Contribution, Metrics, ReleaseManifest
from wire.portions import Part
from wire.scalars import Directions, Scalars, Step

LAYOUT = Layout((Tensor("w", (64,)),))
PARTS = [("a", 1, 2), ("b", 3, 0), ("c", 2, 1)]
"""(device, round of its task, staleness) of what buffer 3 holds."""


def rules(**changes: Any) -> Rules:
    table: dict[str, Any] = {
        "name": "r",
        "base": {"model": "toy", "format": "toy", "digest": "b" * 64},
        "rounds": 5,
        "cohort": {"mode": "async", "buffer": 3, "max_staleness": 3},
        "method": {"id": "lora"},
        "codec": "float32",
        "aggregator": {"id": "mean", "weight_by": "uniform"},
    }
    return Rules.of(run_spec.parse(table | changes), LAYOUT)


def contribution(device: str, number: int, staleness: int, payload: bytes) -> Contribution:
    digest = spec.bytes_digest(payload)
    return Contribution(
        device, "r", number, 1, digest, len(payload), 9, "b" * 64, "e" * 64, Metrics(), staleness=staleness
    )


def parent(by: Rules, blobs: MemoryBlobs) -> ReleaseManifest:
    adapter = blobs.put(bytes(4 * LAYOUT.size))
    return dataclasses.replace(publish.initial(by.spec, LAYOUT, adapter), version=2)


def test_an_update_counts_less_the_older_its_start_and_the_release_says_so() -> None:
    by, blobs = rules(), MemoryBlobs()
    assert by.codec is not None
    accepted = []
    for at, (device, number, staleness) in enumerate(PARTS):
        values = np.full(LAYOUT.size, np.float32(0.25 * (at + 1)))
        payload, _ = by.codec.encode(Delta(LAYOUT, values), by.codec.init(LAYOUT))
        blobs.put(payload)
        accepted.append(contribution(device, number, staleness, payload))
    made = publish.combine(by, parent(by, blobs), accepted, blobs)
    assert [(s.device, s.round, s.staleness) for s in made.release.contributions] == PARTS
    weights = [s.weight for s in made.release.contributions]
    wanted = [1 / np.sqrt(1 + staleness) for _, _, staleness in PARTS]
    np.testing.assert_allclose(np.array(weights) / weights[1], wanted, atol=1e-4)
    mean = np.frombuffer(made.blobs[0], "<f4")
    np.testing.assert_allclose(mean, np.average([0.25, 0.5, 0.75], weights=wanted), atol=1e-4)
    random.Random(1).shuffle(accepted)
    assert publish.combine(by, parent(by, blobs), accepted, blobs).release == made.release


def test_scalars_in_a_buffer_are_replayed_along_the_directions_of_the_round_of_their_task() -> None:
    by, blobs = rules(codec=None, directions={"drawn": "device", "count": 4}), MemoryBlobs()
    assert isinstance(by.directions, Directions)
    accepted = []
    for device, number, staleness in PARTS:
        payload = Scalars.of(by.directions, np.full(4, 0.5)).encode(LAYOUT)
        blobs.put(payload)
        accepted.append(contribution(device, number, staleness, payload))
    made = publish.combine(by, parent(by, blobs), accepted, blobs)
    strands = Step.parse(bytes(made.blobs[0]), by.directions).strands
    assert [key for key, _ in strands] == [by.directions.key(by.spec.seed, number, d) for d, number, _ in PARTS]


def test_what_no_part_of_a_round_holds_does_not_move() -> None:
    layout = Layout(tuple(Tensor(f"layers.{n}.lora_{x}", (2, 2), f"lora_{x}") for n in (0, 1) for x in ("A", "B")))  # type: ignore[arg-type]
    table = spec.plain(rules().spec) | {"cohort": {"goal": 2}, "portions": {"id": "random_layers"}}
    by, blobs, accepted = Rules.of(run_spec.parse(table), layout), MemoryBlobs(), []
    assert by.codec is not None and by.portions is not None
    for device in ("a", "b"):
        portion = by.portions.most(layout, 3, device)
        delta = Delta(portion.layout(layout), np.full(8, 0.5, np.float32))
        payload, _ = Part(layout, portion, delta).encode(by.codec, by.codec.init(delta.layout))
        blobs.put(payload)
        accepted.append(contribution(device, 3, 0, payload))
        ingest.examine(accepted[-1], payload, by)
    start = dataclasses.replace(publish.initial(by.spec, layout, blobs.put(bytes(4 * layout.size))), version=2)
    moved = np.frombuffer(publish.combine(by, start, accepted, blobs).blobs[0], "<f4")
    sent = {n for device in ("a", "b") for n in by.portions.most(layout, 3, device).chosen}
    assert [n in sent for n in range(4)] == [bool(part.any()) for part in np.split(moved, 4)]
    assert set(moved.tolist()) <= {0.0, 0.5}
    rule = by.portions
    other = next(n for n in range(4, 99) if rule.most(layout, n, "a") != rule.most(layout, 3, "a"))
    with pytest.raises(PayloadError, match="do not give in round"):
        ingest.examine(dataclasses.replace(accepted[0], round=other), blobs.get(accepted[0].digest), by)


LARGE = 1 << 16


def peak_of_combining(by: Rules, number: int) -> int:
    """Bytes at the most beyond the stored updates, which a real store maps from disk."""
    blobs, accepted = MemoryBlobs(), []
    start = dataclasses.replace(publish.initial(by.spec, by.layout, blobs.put(bytes(4 * by.layout.size))), version=2)
    for n in range(number):
        if by.codec is None:
            assert by.directions is not None
            payload = Scalars.of(by.directions, np.full(LARGE - 1, 1e-3 * n / number)).encode(by.layout)
        else:
            payload, _ = by.codec.encode(
                Delta(by.layout, np.full(LARGE, 1e-3 * n, np.float32)), by.codec.init(by.layout)
            )
        blobs.put(payload)
        accepted.append(dataclasses.replace(contribution(f"d{n}", 3, 0, payload)))
    tracemalloc.start()
    publish.combine(by, start, accepted, blobs)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cohort": {"goal": 4}},
        {"cohort": {"goal": 4}, "codec": None, "directions": {"drawn": "pool", "count": LARGE - 1}},
    ],
    ids=["deltas in a buffer", "deltas in a round", "scalars of a pool"],
)
def test_combining_takes_one_accumulator_whatever_the_number_of_updates(changes: dict[str, Any]) -> None:
    by = dataclasses.replace(rules(**changes), layout=Layout((Tensor("w", (LARGE,)),)))
    few, many = peak_of_combining(by, 2), peak_of_combining(by, 24)
    assert many < 1.1 * few + 24 * 4096, (few, many)


def test_a_release_of_a_round_names_no_buffer() -> None:
    by, blobs = rules(cohort={"goal": 1}), MemoryBlobs()
    assert by.codec is not None
    payload, _ = by.codec.encode(Delta(LAYOUT, np.zeros(LAYOUT.size, np.float32)), by.codec.init(LAYOUT))
    blobs.put(payload)
    made = publish.combine(
        by, parent(by, blobs), [dataclasses.replace(contribution("a", 3, 0, payload), staleness=None)], blobs
    )
    [share] = made.release.contributions
    assert (share.round, share.staleness, share.weight) == (None, None, 1)
