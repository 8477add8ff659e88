"""Generated answers: which questions are asked, when an answer counts as met, and ROUGE-L against every subsequence there is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.data import Example, Message, Role
from experiments import answers
from experiments.answers import Asked

WORDS = st.lists(st.sampled_from("abcd"), max_size=7)


class Parrot:
    """An engine that says what it was taught, as long as there is room; a token is a character."""

    def __init__(self, taught: dict[str, str]) -> None:
        self._taught, self.text = taught, self

    def ids(self, text: str) -> list[str]:
        return list(text)

    def decoded(self, ids: list[str]) -> str:
        return "".join(ids)

    def prompt(self, text: str, raw: bool) -> list[str]:
        return ["?", *text]

    def generate(self, prompt: str, max_new_tokens: int, temperature: float, seed: int, raw: bool) -> str:
        assert temperature == 0 and not raw
        return self._taught[prompt][:max_new_tokens]


def dialogue(*turns: tuple[Role, str]) -> Example:
    return Example(messages=tuple(Message(*turn) for turn in turns))


def every_subsequence(words: Sequence[str]) -> set[tuple[str, ...]]:
    return {some for size in range(len(words) + 1) for some in itertools.combinations(words, size)}


@given(WORDS, WORDS)
def test_rouge_l_is_the_harmonic_mean_of_precision_and_recall_of_the_longest_of_all_common_subsequences(
    said: list[str], wanted: list[str]
) -> None:
    longest = max(map(len, every_subsequence(said) & every_subsequence(wanted)))
    precision, recall = (longest / len(words) if words else 0.0 for words in (said, wanted))
    mean = 2 * precision * recall / (precision + recall) if longest else 0.0
    assert answers.rouge_l(" ".join(said), " ".join(wanted)) == pytest.approx(mean)


def test_rouge_l_of_published_examples() -> None:
    """Those of the paper (W04-1013, section 3.2): a subsequence in order counts, words out of order do not."""
    wanted = "police killed the gunman"
    assert answers.rouge_l("police kill the gunman", wanted) == 0.75
    assert answers.rouge_l("the gunman kill police", wanted) == 0.5


def test_only_single_questions_are_asked_and_as_many_as_wanted() -> None:
    said = [
        Example(text="plain"),
        dialogue(("user", "one"), ("assistant", "1")),
        dialogue(("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")),
        dialogue(("user", "two"), ("assistant", "2")),
        dialogue(("user", "three"), ("assistant", "3")),
    ]
    assert answers.asked(Parrot({}), said, 64, 2, "!") == [Asked("one!", "1"), Asked("two!", "2")]
    assert answers.asked(Parrot({}), said, 64, 0) == []
    assert answers.asked(object(), said, 64, 2) == [], "an engine that cannot generate"


def test_exact_match_is_of_short_answers_and_rouge_l_of_all() -> None:
    long = "it was the best of times it was the worst of times"
    engine: Any = Parrot({"a": " Yes", "b": "no, never", "c": long})
    given = [Asked("a", "yes"), Asked("b", "no"), Asked("c", long)]
    exact, rouge_l = answers.scored(engine, given)
    assert exact == 0.5 and rouge_l == pytest.approx((1 + 2 / 3 + 1) / 3)
    assert all(map(math.isnan, answers.scored(engine, [])))


def test_an_answer_has_room_for_the_longest_that_is_wanted_and_its_end() -> None:
    engine: Any = Parrot({"a": "12345678", "b": "1"})
    exact, _ = answers.scored(engine, [Asked("a", "1234567"), Asked("b", "1")])
    assert exact == 0.5, "one token more than wanted is seen, and counts against the answer"
    assert answers.scored(Parrot({"a": "12 and more", "b": "1"}), [Asked("a", "1"), Asked("b", "1")])[0] == 0.5
