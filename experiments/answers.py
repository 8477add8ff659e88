"""What a model answers by itself: text that it generates for held-out questions, beside the answer that is wanted."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_client.data import Example
from experiments import measures
from experiments.corpora import SHORT

TURNS = ["user", "assistant"]


@dataclasses.dataclass(frozen=True)
class Asked:
    prompt: str
    wanted: str


def asked(engine: Any, examples: Sequence[Example], length: int, count: int, ending: str = "") -> list[Asked]:
    """The first `count` dialogues of one question and one answer, the question as the model learns it in `length` tokens; none
    for an engine that generates nothing."""
    pairs = [example for example in examples if [turn.role for turn in example.messages] == TURNS]
    short = [measures.shortened(engine, pair, length, ending) for pair in pairs[:count] if hasattr(engine, "generate")]
    return [Asked(*(turn.content for turn in pair.messages)) for pair in short]


def scored(engine: Any, given: Sequence[Asked]) -> tuple[float, float]:
    """(share of the short answers that are met exactly, mean ROUGE-L), each 0 to 1, or not a number where there is none.

    Decoding is greedy, and ends after as many tokens as the longest of all wanted answers has.
    """
    room = 1 + max((len(engine.text.ids(one.wanted)) for one in given), default=0)  # and its end
    said = [(engine.generate(one.prompt, room, 0.0, 0, raw=False), one.wanted) for one in given]
    short = [exact(*pair) for pair in said if len(pair[1]) <= SHORT]
    return _mean(short), _mean([rouge_l(*pair) for pair in said])


def _mean(found: Sequence[float]) -> float:
    return float(np.mean(found)) if found else float("nan")


def exact(said: str, wanted: str) -> bool:
    """Whether two texts are the same but for case and spacing.

    >>> exact(" New  york", "New York"), exact("a < b", "a > b")
    (True, False)
    """
    return said.casefold().split() == wanted.casefold().split()


def rouge_l(said: str, wanted: str) -> float:
    """The harmonic mean of precision and recall of the longest common subsequence of words (ROUGE-L, aclanthology W04-1013).

    >>> rouge_l("police kill the gunman", "Police killed the gunman.")
    0.75
    """
    mine, theirs = (re.findall(r"\w+", text.casefold()) for text in (said, wanted))
    return 2 * _common(mine, theirs) / max(1, len(mine) + len(theirs))


def _common(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence: a row of the table at a time."""
    row = [0] * (len(other) + 1)
    for word in one:
        left, above = 0, row
        row = [0]
        for number, theirs in enumerate(other):
            left = above[number] + 1 if word == theirs else max(left, above[number + 1])
            row.append(left)
    return row[-1]
