"""Schedules of many faults over the embedded store. `make faults` plays a thousand of them, over both kinds of store."""

from __future__ import annotations

import os

import pytest

from tests.faults.sweeping import schedules

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork"),
    pytest.mark.timeout(600),
]


def test_no_schedule_of_faults_loses_or_doubles_an_update_or_leaves_a_run_that_does_not_end() -> None:
    played = schedules("sqlite", 30)
    assert [one for one in played if one["violations"]] == [] and len(played) == 30
    met = {fault for one in played for fault in one["faults"]}
    assert {"kill", "stop", "kill client", "blackout", "kill at step", "stop at step", "full at step"} < met
    assert {"answer lost", "request cut", "clocks off"} < met and sum(one["receipts"] for one in played) > 300


def test_schedules_find_a_bug_that_single_crashes_do_not() -> None:
    assert any(one["violations"] for one in schedules("sqlite", 30, "--bug", "no_to_a_repetition", "--first"))
