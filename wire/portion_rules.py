"""What devices tune and send of a layout, round by round: frozen rows, which both ends know from a run's `[portions]`.

A row says the most that a device may send, and what the device may leave out of it. What the updates of a round leave out is
not moved by that round.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from wire import spec
from wire.banks import banks
from wire.delta import HISTORY, Layout, layer_number
from wire.density import Density
from wire.errors import PayloadError, Reason, SpecError
from wire.portions import MAX_RANK, Portion
from wire.run_spec import RunSpec


class Rule(abc.ABC):
    """A row of PORTIONS, which says what differs. `least_rank`: the smallest rank that a device may choose, None where all have
    the same; `choose`: of how many layers at the most a device sends those it chooses, None where it sends all that it may;
    `rest`: whether it tunes the rest too, and keeps what it could not send; `density`: how much of its part it sends, None for
    all; `names`: of the adapters that the layout has, of which a device sends one, none where it has one."""

    id: ClassVar[str]
    rest: ClassVar[bool] = False
    density: Density | None = None
    least_rank: int | None = None
    names: tuple[str, ...] = ()

    @property
    def choose(self) -> int | None:
        return None

    @abc.abstractmethod
    def most(self, layout: Layout, number: int, device: str) -> Portion:
        """The most that `device` may send in round `number`."""


def rule_of(run: RunSpec) -> Rule | None:
    """What the devices of a run send; None where that is everything. Raises SpecError."""
    rule: Rule | None = None if run.portions is None else spec.build(PORTIONS, run.portions, "portions")
    return rule


def check_layout(rule: Rule, layout: Layout) -> None:
    """Raises SpecError for a layout of which devices would have nothing to send in some round. Two rounds show it: no rule that
    has something in both runs out of it later."""
    if not tunable(layout):
        raise SpecError("portions: the layout has nothing that devices tune")
    for number in (1, 2):
        try:
            rule.most(layout, number, "")
        except ValueError as error:
            raise SpecError(
                f"portions: {rule.id} leaves devices nothing to send in round {number}: an adapter that shares one factor alone"
                ' has none to alternate with. Tune and share both (tuned = "A and B", without keeps = "B"), or leave portions out'
            ) from error


def check(rule: Rule, portion: Portion, layout: Layout, number: int, device: str) -> None:
    """Raises PayloadError for a portion that is not what the run's rule gives this device in this round."""
    most = rule.most(layout, number, device)
    ranks = portion.rank == most.rank or (rule.least_rank is not None and (portion.rank or MAX_RANK) >= rule.least_rank)
    if not (portion.within(most) and ranks and _chosen(rule, portion, most, layout)):
        raise PayloadError(
            Reason.WRONG_LAYOUT, f"a part that the run's portions ({rule.id}) do not give in round {number}"
        )


def _chosen(rule: Rule, portion: Portion, most: Portion, layout: Layout) -> bool:
    """Whether it is all that it may be, or the device's choice: of one bank, or of no more layers than it may choose."""
    if isinstance(rule, Bank):
        return portion.chosen in [rule.within(places, layout) for places in banks(layout).values()]
    if rule.choose is None:
        return portion.chosen == most.chosen
    return len({layer_number(layout.tensors[number].name) for number in portion.chosen}) <= rule.choose


PORTIONS: Mapping[str, str] = {
    "tuned": "wire.portion_rules:Tuned",
    "chosen": "wire.portion_rules:Chosen",
    "alternate": "wire.portion_rules:Alternate",
    "fragments": "wire.portion_rules:Fragments",
    "segments": "wire.portion_rules:Segments",
    "random_layers": "wire.portion_rules:RandomLayers",
    "growing": "wire.portion_rules:Growing",
    "bank": "wire.portion_rules:Bank",
}


@dataclasses.dataclass(frozen=True)
class Tuned(Rule):
    """Everything but history; with `least_rank` a device may have a smaller rank, down to this one."""

    least_rank: int | None = None
    id: ClassVar[str] = "tuned"

    def __post_init__(self) -> None:
        if self.least_rank is not None and not 1 <= self.least_rank <= MAX_RANK:
            raise ValueError(f"least_rank must lie between 1 and {MAX_RANK}")

    def most(self, layout: Layout, number: int, device: str) -> Portion:
        return Portion(tuple(tunable(layout)))


@dataclasses.dataclass(frozen=True)
class Chosen(Rule):
    """Whichever layers the device finds worth it: by the size of their gradients, at most `layers` of them."""

    layers: int = 1
    id: ClassVar[str] = "chosen"

    def __post_init__(self) -> None:
        _check_count("layers", self.layers)

    @property
    def choose(self) -> int:
        return self.layers

    def most(self, layout: Layout, number: int, device: str) -> Portion:
        return Portion(tuple(tunable(layout)))


@dataclasses.dataclass(frozen=True)
class Alternate(Rule):
    """B in odd rounds, A in even ones, the other frozen: each round's mean of products is exact (RoLoRA, arXiv 2502.01755)."""

    id: ClassVar[str] = "alternate"

    def most(self, layout: Layout, number: int, device: str) -> Portion:
        frozen = "lora_A" if number % 2 else "lora_B"
        return Portion(tuple(n for n in tunable(layout) if layout.tensors[n].role != frozen))


@dataclasses.dataclass(frozen=True)
class Fragments(Rule):
    """Every device sends the same of `count` fragments, one after the other (Streaming DiLoCo, arXiv 2501.18512)."""

    count: int = 4
    id: ClassVar[str] = "fragments"
    rest: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_count("count", self.count)

    def most(self, layout: Layout, number: int, device: str) -> Portion:
        return Portion(fragments(layout, self.count)[(number - 1) % self.count])


@dataclasses.dataclass(frozen=True)
class Segments(Rule):
    """Every device begins elsewhere in `count` segments, so that a round has them all (EcoLoRA, arXiv 2506.02001). With a
    `density` it sends the largest entries of its segment alone, fewer as its loss falls, and the rest when their turn comes."""

    count: int = 4
    density: Density | None = dataclasses.field(default=None, metadata=spec.LATER)
    id: ClassVar[str] = "segments"
    rest: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check_count("count", self.count)

    def most(self, layout: Layout, number: int, device: str) -> Portion:
        return Portion(fragments(layout, self.count)[(number - 1 + chance(device)) % self.count])


@dataclasses.dataclass(frozen=True)
class RandomLayers(Rule):
    """`layers` layers, drawn anew for each device and round (FedRA, arXiv 2311.11227)."""

    layers: int = 1
    id: ClassVar[str] = "random_layers"

    def __post_init__(self) -> None:
        _check_count("layers", self.layers)

    def most(self, layout: Layout, number: int, device: str) -> Portion:
        every = layers(layout)
        drawn = np.random.Generator(np.random.Philox(key=chance(f"{device}/{number}"))).permutation(len(every))
        keep = {every[n] for n in drawn[: self.layers]}
        return Portion(tuple(n for n in tunable(layout) if layer_number(layout.tensors[n].name) in keep))


@dataclasses.dataclass(frozen=True)
class Growing(Rule):
    """At first the last `layers` layers at `rank`; every `rounds` rounds as many more of both (FedAdapter, arXiv 2205.10162)."""

    layers: int = 1
    rank: int = 1
    rounds: int = 1
    id: ClassVar[str] = "growing"

    def __post_init__(self) -> None:
        for name in ("layers", "rank", "rounds"):
            _check_count(name, getattr(self, name))

    def most(self, layout: Layout, number: int, device: str) -> Portion:
        step, every = 1 + (number - 1) // self.rounds, layers(layout)
        keep = set(every[-min(len(every), step * self.layers) :])
        chosen = tuple(n for n in tunable(layout) if layer_number(layout.tensors[n].name) in keep)
        return Portion(chosen, min(MAX_RANK, step * self.rank))


@dataclasses.dataclass(frozen=True)
class Bank(Rule):
    """An adapter for each of `names` in one run, and of them the one whose loss on the device's text is the least, or that its
    person names (IFCA, arXiv 2006.04088): what the updates of a bank say moves that bank alone."""

    names: tuple[str, ...] = ("first", "second")
    id: ClassVar[str] = "bank"

    def __post_init__(self) -> None:
        if not 2 <= len(set(self.names)) == len(self.names) <= 1024:
            raise ValueError("names: from 2 to 1024 banks, each with a name of its own")
        if not all(BANK.fullmatch(name) for name in self.names):
            raise ValueError("names: 1 to 64 of a-z 0-9 _ - each, starting with a letter or digit")

    def most(self, layout: Layout, number: int, device: str) -> Portion:
        return Portion(tuple(tunable(layout)))

    def within(self, bank: Sequence[int], layout: Layout) -> tuple[int, ...]:
        """What a device sends that computes with `bank`, the places of its tensors."""
        return tuple(sorted(set(bank).intersection(tunable(layout))))


BANK = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


def _check_count(name: str, value: int) -> None:
    if not 1 <= value <= 1_000_000:
        raise ValueError(f"{name} must lie between 1 and 1,000,000")


def tunable(layout: Layout) -> Sequence[int]:
    """The places of the tensors that devices tune."""
    return [number for number, tensor in enumerate(layout.tensors) if tensor.role not in HISTORY]


def layers(layout: Layout) -> list[int | None]:
    """The layers that have something to tune, from the first to the last; [None] for a layout without layers."""
    found = {layer_number(layout.tensors[n].name) for n in tunable(layout)}
    return sorted(found, key=lambda layer: -1 if layer is None else layer)


def fragments(layout: Layout, count: int) -> list[tuple[int, ...]]:
    """The tunable tensors in `count` runs of about as many entries each; fewer tensors than that come several times."""
    places = tunable(layout)
    sizes = np.array([layout.tensors[n].size for n in places], np.int64)
    middle = np.cumsum(sizes) - sizes // 2
    owner = (middle * count // int(sizes.sum())).tolist()
    found = [tuple(p for p, mine in zip(places, owner, strict=True) if mine == n) for n in range(count)]
    return [each or (places[n % len(places)],) for n, each in enumerate(found)]


def chance(text: str) -> int:
    """A number of 56 bits that follows from `text` on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
