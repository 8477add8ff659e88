"""Whole federations in virtual time: whatever befalls them, by every seed, the invariants hold."""

from __future__ import annotations

import dataclasses
import itertools
import os
import subprocess
import sys

import pytest

from tests.faults.mistakes import MISTAKES
from tests.faults.plans import SIZES, plan
from tests.faults.simulation import Outcome, shrunk, simulate

SEEDS = range(40)
MORE = range(40, 320)
"""Looked through for what the first do not show: a change of the program is a change of every trace."""
SEEN = {
    "dies at commit\n",
    "dies at commit done",
    "dies at file put",
    "dies at file half a part",
    "dies at file part done",
    "is killed",
    "answer is lost",
    "CheckIn → replica2",
    "AppendUpload → ",
    " again",
    "CreateUpload → ",
    "gives up",
}
"""What traces must show besides the kinds of fault."""


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return [simulate(plan(seed)) for seed in SEEDS]


def test_no_seed_loses_a_receipt_counts_twice_breaks_a_deadline_or_does_not_end(outcomes: list[Outcome]) -> None:
    assert {outcome.seed: outcome.faults for outcome in outcomes if outcome.faults} == {}


def test_the_seeds_see_every_kind_of_fault_and_of_end(outcomes: list[Outcome]) -> None:
    assert {outcome.state for outcome in outcomes} == {"done", "failed", "stopped"}
    unseen = {f"world    {kind}" for kind in SIZES} | SEEN
    for outcome in itertools.chain(outcomes, (simulate(plan(seed)) for seed in MORE)):
        trace = "\n".join(outcome.trace)
        unseen = {what for what in unseen if what not in trace}
        if not unseen:
            return
    assert unseen == set()


def test_the_same_seed_gives_the_same_trace_in_another_process(outcomes: list[Outcome]) -> None:
    line = [sys.executable, "-m", "tests.faults.simulation", "--seed", "1"]
    again = subprocess.run(line, capture_output=True, text=True, timeout=60, env=os.environ | {"PYTHONHASHSEED": "7"})
    assert again.returncode == 0 and f"trace {outcomes[1].digest}\n" in again.stdout


def test_another_seed_gives_another_trace(outcomes: list[Outcome]) -> None:
    assert len({outcome.digest for outcome in outcomes}) == len(SEEDS)


@pytest.mark.parametrize("mistake", sorted(MISTAKES))
def test_each_seeded_bug_is_caught_within_60_seeds(mistake: str) -> None:
    assert any(simulate(plan(seed), mistake).faults for seed in range(60))


def test_a_failure_is_shrunk_to_the_operations_that_it_needs() -> None:
    whole, mistake = plan(0), "deadline_by_its_own_clock"
    small = shrunk(whole, mistake)
    assert len(small.ops) < len(whole.ops) and simulate(small, mistake).faults
    fewer = [tuple(op for op in small.ops if op is not left_out) for left_out in small.ops]
    assert not any(simulate(dataclasses.replace(small, ops=ops), mistake).faults for ops in fewer)
