"""As `test_single_crashes.py`, over a database and a bucket."""

from __future__ import annotations

import os

import pytest

from tests import servers
from tests.faults.sweeping import sweep

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this platform cannot fork"),
    pytest.mark.timeout(600),
]


def test_no_crash_over_a_database_and_a_bucket_loses_or_doubles_anything_either() -> None:
    with servers.postgres(power_may_fail=False) as database, servers.seaweedfs() as bucket:
        crashes = sweep("--servers", database.url, bucket.address)
    assert [crash for crash in crashes if crash["faults"]] == []
    steps = {crash["step"] for crash in crashes}
    assert len(crashes) > 100 and {"COMMIT", "COMMIT done", "bucket put", "bucket put done", "blob delete"} < steps
