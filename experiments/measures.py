"""What is measured of an adapter: losses on held-out text, and how often the right answer is the likeliest."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edge_client.data import Example, Message
from edge_client.engines import Tokens

ANSWER_TOKENS = 8
READ = 4
"""Examples that are tokenized for one sequence that is wanted: those whose answer lies beyond the length are left out."""


def sequences(engine: Any, examples: Sequence[Example], length: int, wanted: int, ending: str = "") -> list[Tokens]:
    """The first `wanted` sequences of at most `length` tokens; of a question that is too long the beginning is kept, and
    `ending` is put behind each."""
    short = [shortened(engine, example, length, ending) for example in examples[: READ * wanted]]
    found: list[Tokens] = engine.tokenize(short, length)
    return found[:wanted]


def shortened(engine: Any, example: Example, length: int, ending: str = "") -> Example:
    """An example whose question leaves room for an answer; `ending` is put behind the question. Plain text stays."""
    text = getattr(engine, "text", None)
    if not example.messages:
        return example
    asked, *rest = example.messages
    if text is None:  # an engine whose tokens are bytes
        return Example(messages=(Message(asked.role, asked.content[: length // 2] + ending), *rest))
    room = length - len(text.prompt(ending, raw=False)) - max(ANSWER_TOKENS, _answer_room(text, rest, length))
    kept = text.decoded(text.ids(asked.content)[:room])
    return Example(messages=(Message(asked.role, kept + ending), *rest))


def _answer_room(text: Any, rest: Sequence[Message], length: int) -> int:
    """Tokens of the answer, if a question of a third of the length fits beside it."""
    return min(2 * length // 3, sum(len(text.ids(message.content)) + 2 for message in rest))


def mean_loss(engine: Any, some: Sequence[Tokens]) -> float:
    """In nats a target; not a number where there is none."""
    if not some:
        return float("nan")
    total, targets = engine.loss(some)
    return float(total / targets)


def chosen(engine: Any, asked: Sequence[Sequence[Tokens]]) -> list[npt.NDArray[np.float64]]:
    """For each question the summed loss of every answer as a whole, in nats: the least is the likeliest."""
    return [np.array([engine.loss([answer])[0] for answer in answers]) for answers in asked]


def accuracy(engine: Any, asked: Sequence[Sequence[Tokens]], right: Sequence[int]) -> float:
    """How often the right answer is the likeliest, 0 to 1; not a number without questions."""
    if not asked:
        return float("nan")
    found = chosen(engine, asked)
    return float(np.mean([int(np.argmin(sums)) == mine for sums, mine in zip(found, right, strict=True)]))


def forget_peak() -> None:
    """Let `peak_rss_bytes` count from now on, where the system can (Linux); elsewhere it goes on counting from the start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
