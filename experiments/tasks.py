"""What the experiments learn: a text for each device, a text that is held out, and the answers to choose among."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import numpy as np

from edge_client.data import Example, Message
from experiments import texts
from experiments.partitions import cut
from experiments.texts import Texts

ALPHA = 0.5
"""The Dirichlet split's concentration: topics are spread unevenly over devices."""


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """`devices`: what each has. `labels`: the answers of a classification, none for plain text. `question` ends each prompt."""

    devices: Mapping[str, list[Example]]
    test: list[Example]
    labels: tuple[str, ...] = ()
    question: str = ""


def r8(devices: int, train: int, test: int, seed: int) -> Task:
    """Newswire to its topic, one of eight."""
    return _classification(texts.reuters("train"), texts.reuters("test"), "Topic?", devices, train, test, seed)


def hotels(devices: int, train: int, test: int, seed: int) -> Task:
    """A sentence of a hotel review to its sentiment, one of three."""
    found = texts.hotels()
    first = {label: some[::2] for label, some in found.items()}
    second = {label: some[1::2] for label, some in found.items()}
    return _classification(first, second, "Sentiment?", devices, train, test, seed)


def speeches(devices: int, train: int, test: int, seed: int) -> Task:
    """The speeches of the roles that say most, a role a device; every fifth speech is held out."""
    roles = texts.shakespeare()
    most = sorted(roles, key=lambda role: (-sum(len(s.split()) for s in roles[role]), role))[:devices]
    kept = [[Example(text=s) for i, s in enumerate(roles[role]) if i % 5] for role in most]
    held_out = [Example(text="\n".join(roles[role][::5])) for role in most]
    return Task({f"device-{n}": some for n, some in enumerate(kept)}, held_out)


TASKS: Mapping[str, Callable[[int, int, int, int], Task]] = {"r8": r8, "hotels": hotels, "speeches": speeches}
"""Name -> (devices, training examples in all, test examples, seed) -> Task."""


def _classification(
    train: Texts, test: Texts, question: str, devices: int, trained: int, tested: int, seed: int
) -> Task:
    chance = np.random.Generator(np.random.Philox(key=seed))
    learned = _drawn(train, trained, chance)
    labels = sorted(train)
    dealt: dict[str, list[Example]] = {f"device-{n}": [] for n in range(devices)}
    for label in labels:
        some = [example for example in learned if example.messages[1].content == label]
        shares = chance.dirichlet([ALPHA] * devices)
        for name, part in zip(dealt, cut(some, shares), strict=True):
            dealt[name] += part
    held_out = _drawn(test, tested, np.random.Generator(np.random.Philox(key=0)))  # the same for every seed
    return Task({name: part for name, part in dealt.items() if part}, held_out, tuple(labels), question)


def _drawn(found: Texts, count: int, chance: np.random.Generator) -> list[Example]:
    """`count` of all examples, as often of each label as the source has it."""
    rows = [(text, label) for label in sorted(found) for text in found[label]]
    return [_asked(*rows[i]) for i in chance.permutation(len(rows))[:count]]


def _asked(text: str, label: str) -> Example:
    return Example(messages=(Message("user", text), Message("assistant", label)))
