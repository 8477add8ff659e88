"""kill -9 at every step of a store, one at a time: nothing that has a receipt is ever lost."""

from __future__ import annotations

import os

import pytest

from tests.faults.bugs import BUGS
from tests.faults.sweeping import sweep

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork"),
    pytest.mark.timeout(600),
]


def test_no_crash_loses_a_receipt_counts_an_update_twice_or_leaves_a_run_that_does_not_end() -> None:
    crashes = sweep()
    assert [crash for crash in crashes if crash["faults"]] == []
    steps = {crash["step"] for crash in crashes}
    assert len(crashes) > 80 and {"COMMIT", "COMMIT done", "file write", "file link", "file link done"} < steps


@pytest.mark.parametrize("bug", [name for name, bug in BUGS.items() if bug.step])
def test_the_sweep_finds_each_seeded_bug(bug: str) -> None:
    assert sweep("--bug", bug)[-1]["faults"]
