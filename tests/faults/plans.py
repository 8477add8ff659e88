"""What one seed sets going: a federation, its weather, and the operations that befall it. Pure."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

from tests.faults.network import Weather
from wire import run_spec
from wire.run_spec import RunSpec


@dataclasses.dataclass(frozen=True)
class Op:
    """`kind` names a method of World, `who` its replica or device; `size` is what the kind makes of it: steps or seconds."""

    at_s: float
    kind: str
    who: str
    size: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """`train_s` has the seconds that each device trains; updates above `chunk_bytes` travel in parts, which blobs that are
    `growing` take up one after the other."""

    seed: int
    replicas: int
    train_s: tuple[float, ...]
    rounds: int
    cohort: dict[str, Any]
    chunk_bytes: int
    growing: bool
    weather: Weather
    storm_s: float
    ops: tuple[Op, ...]

    def run(self) -> RunSpec:
        return run_spec.parse(
            {
                "name": "run",
                "base": {"model": "toy", "format": "toy", "digest": "b" * 64},
                "rounds": self.rounds,
                "cohort": self.cohort,
                "method": {"id": "lora"},
                "codec": "float32",
                "server_optimizer": {"id": "momentum"},
                "seed": self.seed,
            }
        )


SIZES: dict[str, Callable[[random.Random], float]] = {
    "kill_replica": lambda chance: chance.randint(0, 40),
    "stop_replica": lambda chance: chance.choice([0.5, 3.0, 8.0]),
    "kill_device": lambda chance: chance.uniform(0.1, 6.0),
    "cut_off": lambda chance: chance.uniform(0.5, 8.0),
    "pause_run": lambda chance: chance.uniform(0.5, 6.0),
    "stop_run": lambda chance: 0.0,
}
OFTEN = ("kill_replica",) * 8 + ("stop_replica",) * 4 + ("kill_device",) * 5 + ("cut_off",) * 3 + ("pause_run",) * 2


def plan(seed: int) -> Plan:
    """The same for the same seed, on every machine."""
    chance = random.Random(f"{seed}/plan")
    replicas, devices = chance.randint(2, 3), chance.randint(3, 6)
    storm_s = chance.uniform(8.0, 20.0)
    slow = {device for device in range(1, devices) if chance.random() < 0.15}
    deadline_s = chance.uniform(3.0, 6.0)
    train_s = [chance.uniform(0.1, 1.5) + (deadline_s if device in slow else 0.0) for device in range(devices)]
    return Plan(
        seed=seed,
        replicas=replicas,
        train_s=tuple(train_s),
        rounds=chance.randint(2, 4),
        cohort=_cohort(chance, devices, deadline_s),
        chunk_bytes=chance.choice([40, 40, 1 << 20]),
        growing=chance.random() < 0.5,
        weather=_weather(chance),
        storm_s=storm_s,
        ops=tuple(_op(chance, replicas, devices, storm_s) for _ in range(chance.randint(1, 8))),
    )


def _cohort(chance: random.Random, devices: int, deadline_s: float) -> dict[str, Any]:
    size = chance.randint(1, min(4, devices))
    table = {
        "minimum": chance.randint(1, size),
        "deadline_s": deadline_s,
        "over_selection": chance.choice([1.0, 1.5, 2.0]),
        "max_attempts": chance.randint(3, 6),
    }
    if chance.random() < 0.5:
        return table | {"goal": size}
    return table | {"mode": "async", "buffer": size, "max_staleness": chance.randint(0, 3)}


def _weather(chance: random.Random) -> Weather:
    bad = chance.choice([0.0, 0.02, 0.1])
    return Weather(bad, bad, 4 * bad, bad, chance.choice([0.01, 0.1, 1.0]), bad)


def _op(chance: random.Random, replicas: int, devices: int, storm_s: float) -> Op:
    kind = "stop_run" if chance.random() < 0.01 else chance.choice(OFTEN)
    replica, device = chance.randrange(replicas), chance.randrange(devices)
    whose = {"kill_device": str(device), "cut_off": chance.choice([f"replica{replica}", f"d{device}"])}
    return Op(chance.uniform(0.0, storm_s), kind, whose.get(kind, str(replica)), SIZES[kind](chance))
