"""Domains of the benchmark: examples with whose they are, held-out ones, and questions with answers to choose among.

Built in are those that packages carry; every other name, and one that a folder has, is a pair of files there
(`experiments/domains.py`).
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from edge_client.data import Example, Message
from experiments import domains, texts
from experiments.partitions import Item, dealt
from experiments.texts import Texts
from wire.errors import UserError

CHOICES = 4
"""Answers to choose among where a domain has no labels: the right one, and others' of the same client."""
SHORT = 40
"""Characters of an answer that can be chosen."""
BUILT_IN = "built in"
OWN = 5
"""Every so manieth example of a device is its own held-out text."""


@dataclasses.dataclass(frozen=True)
class Question:
    """An example whose answer is to be found among `answers`."""

    example: Example
    answers: tuple[str, ...]

    @property
    def right(self) -> int:
        return self.answers.index(self.example.messages[-1].content)


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """A domain: training examples with the key of each (client, topic), and what is held out. `ending` ends each question."""

    train: list[Example]
    keys: list[str]
    test: list[Example]
    questions: list[Question]
    ending: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Share:
    """What a device has: text to learn from, and text of its own to be measured on."""

    train: list[Example]
    own: list[Example]


def speeches(devices: int) -> Corpus:
    """The roles that say most, in plays; a role is a client. Every seventh speech is held out."""
    return _plain(texts.shakespeare(), devices)


def chat(devices: int) -> Corpus:
    """What people wrote to each other; a sender is a client."""
    return _plain(texts.chat(), devices)


def news(devices: int) -> Corpus:
    """Newswire to its topic, one of eight; a topic is a key."""
    train, test = texts.reuters("train"), texts.reuters("test")
    labels = tuple(sorted(train))
    rows = [(label, text) for label in labels for text in train[label]]
    asked = [_asked(text, label) for label in labels for text in test[label]]
    return Corpus(
        [_asked(text, label) for label, text in rows], [label for label, _ in rows],
        asked, [Question(example, labels) for example in asked], "\nTopic?",
    )  # fmt: skip


CORPORA: Mapping[str, Callable[[int], Corpus]] = {"speeches": speeches, "news": news, "chat": chat}
"""Name -> devices -> corpus."""


def corpus(name: str, devices: int, folder: Path | None) -> Corpus:
    """NAME.train.jsonl and NAME.test.jsonl of `folder` where it has them, else a domain that is built in. Raises UserError."""
    if built_in(name, folder):
        return CORPORA[name](devices)
    if folder is None:
        raise UserError(f"--domains: {name!r} is none of {', '.join(CORPORA)}; give a folder that has it as --data")
    keys, train = domains.read(folder, f"{name}.train")
    owners, test = domains.read(folder, f"{name}.test")
    return Corpus(train, keys, test, _among_others(owners, test))


def built_in(name: str, folder: Path | None) -> bool:
    """Whether a domain is a package's: a folder that has one of its name goes before."""
    return name in CORPORA and (folder is None or name not in domains.names(folder))


def digests(named: Sequence[str], folder: Path | None) -> dict[str, str]:
    """Of each domain the SHA-256 of its text in `folder`, or that it is a package's, which has a version."""
    own = {} if folder is None else domains.digests(folder, named)
    return {name: BUILT_IN for name in named if name in CORPORA} | own


def shared_out(found: Corpus, partition: str, devices: int, seed: int) -> dict[str, Share]:
    """Every training example on one device, by a row of PARTITIONS."""
    shares = dealt(partition, found.keys, devices, np.random.Generator(np.random.Philox(key=seed)))
    return {f"device-{n}": _share([found.train[i] for i in share]) for n, share in enumerate(shares)}


def _share(examples: Sequence[Example]) -> Share:
    return Share([e for i, e in enumerate(examples) if i % OWN], list(examples[::OWN]))


def shuffled(examples: Sequence[Item]) -> list[Item]:
    """In an order that is the same for every seed."""
    order = np.random.Generator(np.random.Philox(key=0)).permutation(len(examples))
    return [examples[i] for i in order]


def _plain(found: Texts, devices: int) -> Corpus:
    most = sorted(found, key=lambda key: (-sum(len(s.split()) for s in found[key]), key))[:devices]
    rows = [(key, Example(text=text)) for key in most for i, text in enumerate(found[key]) if i % 7]
    held_out = [Example(text=text) for key in most for text in found[key][::7]]
    return Corpus([example for _, example in rows], [key for key, _ in rows], held_out, [])


def _asked(text: str, label: str) -> Example:
    return Example(messages=(Message("user", text), Message("assistant", label)))


def _among_others(owners: Sequence[str], test: Sequence[Example]) -> list[Question]:
    """The test examples with short answers, each beside short answers of the same client; those with fewer than two are left."""
    short: dict[str, list[Example]] = defaultdict(list)
    for owner, example in zip(owners, test, strict=True):
        if example.messages and len(example.messages[-1].content) <= SHORT:
            short[owner].append(example)
    asked = [(example, _answers(example, some)) for some in short.values() for example in some]
    return [Question(example, answers) for example, answers in asked if len(answers) > 1]


def _answers(example: Example, some: Sequence[Example]) -> tuple[str, ...]:
    right = example.messages[-1].content
    others = sorted({e.messages[-1].content for e in some} - {right})
    chance = np.random.Generator(np.random.Philox(key=len(others)))
    drawn = [others[i] for i in chance.permutation(len(others))[: CHOICES - 1]]
    return tuple(sorted([right, *drawn]))
