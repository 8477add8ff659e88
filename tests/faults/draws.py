"""What a seed says of a schedule: its run, how many processes, and every fault. Pure: the same seed gives the same again.

What is not drawn is how processes interleave: a seed that failed once is played again with the same faults, and fails again
as often as its faults make likely.
"""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Literal

from wire import run_spec
from wire.delta import Layout, Tensor
from wire.run_spec import RunSpec

Lane = Literal["sqlite", "postgresql"]
LANES: tuple[Lane, ...] = ("sqlite", "postgresql")
LAYOUT = Layout((Tensor("w", (32, 32)),))
SKEWED: dict[Lane, float] = {"sqlite": 0.25, "postgresql": 0.5}
"""The share of schedules in which clocks differ: over SQLite, where that is one host's clock, they leave less to compare."""
SHORT_S = 1.0
"""The deadline of rounds that some device misses now and then, because it dawdles longer."""

OF_RELEASES = ("INSERT INTO releases", "INSERT INTO rounds")
OF_ROUNDS = ("UPDATE rounds SET", "UPDATE runs SET")
OF_UPDATES = (
    *("INSERT INTO contributions", "UPDATE assignments SET", "INSERT INTO assignments"),
    *("INSERT INTO uploads", "DELETE FROM upload_parts", "DELETE FROM uploads"),
)
OF_PARTS = ("UPDATE uploads SET", "INSERT INTO upload_parts")
OFTEN = {OF_RELEASES: 0.5, OF_ROUNDS: 1, OF_UPDATES: 2, OF_PARTS: 4}
"""How often, about, a replica takes such a step before something befalls it there."""
STATEMENTS = (OF_RELEASES, OF_RELEASES, OF_ROUNDS, OF_UPDATES)
"""A release comes once in a round: twice the share, so that it is met as often as what every device does."""
COMMITS = ("COMMIT", "COMMIT done")
CLOSER = ("combine", "combine done")
FATES = {
    "statement": ("kill", "stop", "full", "full"),
    "commit": ("kill", "kill", "stop", "full"),
    "blob": ("kill", "stop", "stop", "full"),
    "closer": ("kill", "stop", "stop", "stop"),
    "part": ("kill", "stop", "full", "full"),
}
BLOB_STEPS: dict[Lane, tuple[str, ...]] = {
    "sqlite": ("file write", "file write done", "file link", "file link done", "blob delete", "blob delete done"),
    "postgresql": ("bucket put", "bucket put done", "blob delete", "blob delete done"),
}


@dataclasses.dataclass(frozen=True)
class Strike:
    """What befalls a replica at the arrivals `first` to `last` at a step: it dies, stops for a while, or has a full disk.
    With `then`, not at that step, a statement, but at the commit of the transaction that it is in."""

    step: str
    first: int
    last: int
    what: Literal["kill", "stop", "full"]
    then: str | None = None

    @property
    def place(self) -> str:
        """As journals name it."""
        return f"{self.then} of {self.step}" if self.then else self.step


@dataclasses.dataclass(frozen=True)
class Life:
    """One incarnation of a replica. `skew_s`: how far its host's clock is off."""

    strikes: tuple[Strike, ...] = ()
    skew_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Incident:
    """What befalls a process, or all of them, at an instant. `who` counts from 1; `for_s`: until it goes on or comes back."""

    at_s: float
    kind: Literal["kill", "stop", "blackout", "kill client", "database", "bucket"]
    who: int
    for_s: float


@dataclasses.dataclass(frozen=True)
class Weather:
    """How often a link to the coordinators cuts or delays, for each time bytes come by."""

    cut: float
    lose_answer: float
    lose_receipt: float
    delay: float
    longest_delay_s: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """A whole schedule, but for what each replica's lives and each link's weather are. The first `uploaders` clients send their
    updates in parts; a replica that stops at a step goes on after `stopped_s`. It is stormy for `lasts_s`, or until the last
    training round, if that comes sooner."""

    seed: int
    lane: Lane
    replicas: int
    clients: int
    uploaders: int
    run: RunSpec
    lasts_s: float
    stopped_s: float
    skewed: bool
    incidents: tuple[Incident, ...]


def scene(seed: int, lane: Lane) -> Scene:
    chance = Random(f"edgetune schedule {lane} {seed}")
    replicas, clients, lasts_s = chance.choice((2, 2, 3)), chance.choice((3, 4)), chance.uniform(10.0, 15.0)
    kinds = ["kill", "stop", "kill client", *(["blackout"] if chance.random() < 0.5 else [])]
    count = chance.choice((0, 1, 2))
    incidents = [_incident(chance, chance.choice(kinds), replicas, clients, lasts_s) for _ in range(count)]
    if lane == "postgresql" and chance.random() < 0.15:
        incidents.append(_incident(chance, "database", replicas, clients, lasts_s))
    if lane == "postgresql" and chance.random() < 0.02:
        incidents.append(_incident(chance, "bucket", replicas, clients, lasts_s))
    return Scene(
        seed=seed,
        lane=lane,
        replicas=replicas,
        clients=clients,
        uploaders=chance.choice((1, 2)),
        run=_run(chance, seed, clients),
        lasts_s=lasts_s,
        stopped_s=chance.uniform(0.4, 1.2),
        skewed=chance.random() < SKEWED[lane],
        incidents=tuple(sorted(incidents, key=lambda one: one.at_s)),
    )


def life(drawn: Scene, replica: int, incarnation: int) -> Life:
    """Two to four strikes; some are of a step that it does not come to."""
    chance = Random(f"edgetune life {drawn.lane} {drawn.seed} {replica} {incarnation}")
    skew_s = chance.choice((-3600.0, 7200.0, 0.0)) * chance.random() if drawn.skewed else 0.0
    strikes = tuple(_strike(chance, drawn.lane) for _ in range(chance.randint(2, 4)))
    return Life(strikes, skew_s)


def weather(drawn: Scene, client: int, incarnation: int) -> Weather:
    """An upload in parts takes more calls than all else: its link breaks more often, so that it breaks in the middle."""
    chance = Random(f"edgetune link {drawn.lane} {drawn.seed} {client} {incarnation}")
    if client <= drawn.uploaders:
        return Weather(chance.uniform(0.03, 0.1), chance.uniform(0, 0.06), 0.1, 0.1, 0.02)
    if chance.random() < 0.25:
        return Weather(0.0, 0.0, 0.0, 0.0, 0.0)
    return Weather(chance.uniform(0, 0.03), chance.uniform(0, 0.05), 0.3, chance.uniform(0, 0.2), 0.05)


def _incident(chance: Random, kind: str, replicas: int, clients: int, lasts_s: float) -> Incident:
    who = chance.randint(1, clients if kind == "kill client" else replicas)
    for_s = chance.uniform(0.3, 1.5) if kind == "stop" else chance.uniform(0.0, 0.15)
    return Incident(chance.uniform(0.1, lasts_s / 4), kind, who, for_s)  # type: ignore[arg-type]  # one of them


def _strike(chance: Random, lane: Lane) -> Strike:
    """At a commit, at a blob, at a part of an upload and at the combining of a round as often as at each other; within a
    transaction half as often. Which of its statements a replica dies at is all the same; that it fails there, and lives, is
    not. A closer is stopped more often than killed: what it does when it goes on, another may have done meanwhile."""
    kind = chance.choice(("statement", "commit", "commit", "blob", "blob", "part", "part", "closer", "closer"))
    among, often = _places(chance, kind, lane)
    step, first = chance.choice(among), 1 + int(chance.expovariate(1 / often))
    then = chance.choice(COMMITS) if kind == "commit" or (kind == "part" and chance.random() < 0.5) else None
    what = chance.choice(FATES[kind])
    if what == "full" and (then or step).endswith("done"):
        what = "kill"
    last = first + (chance.choice((0, 1, 3)) if what == "full" else 0)
    return Strike(step, first, last, what, then)  # type: ignore[arg-type]  # one of them


def _places(chance: Random, kind: str, lane: Lane) -> tuple[tuple[str, ...], float]:
    """Steps, and how often one of them comes before something befalls a replica there."""
    match kind:
        case "blob":
            return BLOB_STEPS[lane], 3
        case "closer":
            return CLOSER, 0.5
        case "part":
            return OF_PARTS, OFTEN[OF_PARTS]
    among = chance.choice(STATEMENTS)
    return among, OFTEN[among]


def _run(chance: Random, seed: int, clients: int) -> RunSpec:
    goal = chance.randint(2, clients)
    short = chance.random() < 0.5
    cohort: dict[str, object] = {
        "minimum": chance.choice((1, goal, goal)),
        "over_selection": chance.choice((1.0, 2.0, 2.0)),
    }
    cohort |= {"deadline_s": SHORT_S if short else 600.0, "max_attempts": 10_000}
    buffers = chance.random() < 0.2
    cohort |= {"mode": "async", "buffer": goal, "max_staleness": 2} if buffers else {"goal": goal}
    return run_spec.parse(
        {
            "name": "run",
            "base": {"model": "toy", "format": "toy", "digest": "b" * 64},
            "rounds": chance.randint(4, 8),
            "cohort": cohort,
            "method": {"id": "lora"},
            "codec": "float32",
            "server_optimizer": {"id": "momentum"},
            "seed": seed,
            **({"downlink": {"codec": "top_k_int4_5"}} if chance.random() < 0.25 else {}),
        }
    )
