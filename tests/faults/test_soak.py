"""A short soak: thirty unsteady devices, two replicas killed in turn."""

from __future__ import annotations

from pathlib import Path

from tests.faults.soak import Options, soak


def test_unsteady_devices_and_replicas_killed_in_turn_lose_no_update_and_count_none_twice(tmp_path: Path) -> None:
    result = soak(
        Options(clients=30, seconds=9.0, lane="embedded", kill_every_s=3.0, train_s=0.5, corrupt=0.1), tmp_path
    )
    assert result.wrong == []
    assert result.kills >= 2 and result.releases >= 2 and result.counted >= result.releases * 12
    assert result.vanished > 0 and sum(result.corrupted.values()) > 0
