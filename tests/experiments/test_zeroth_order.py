"""The experiments: text is dealt once, a cell that is there is not done again, and the table says what the cells say."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import tasks, texts, zeroth_order
from experiments.zeroth_order import Cell, Point

TOPICS = {label: [f"{label} {n} rises and falls" for n in range(40)] for label in ("corn", "gold", "ship")}


@pytest.fixture
def newswire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "reuters", lambda part: TOPICS)


@pytest.mark.usefixtures("newswire")
def test_every_example_is_dealt_once_and_topics_unevenly() -> None:
    task = tasks.r8(4, 100, 10, 0)
    dealt = [example.messages[0].content for some in task.devices.values() for example in some]
    assert len(dealt) == len(set(dealt)) == 100
    shares = [
        [sum(e.messages[1].content == label for e in some) / len(some) for label in task.labels]
        for some in task.devices.values()
    ]
    assert max(max(share) for share in shares) > 0.5
    assert task.labels == ("corn", "gold", "ship")


@pytest.mark.usefixtures("newswire")
def test_seeds_deal_otherwise_and_are_judged_by_the_same_text() -> None:
    one, two = tasks.r8(4, 100, 10, 0), tasks.r8(4, 100, 10, 1)
    assert one.test == two.test
    assert one.devices != two.devices
    assert one.devices == tasks.r8(4, 100, 10, 0).devices


@pytest.mark.usefixtures("newswire")
def test_a_cell_runs_from_text_to_table_on_a_real_base(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(zeroth_order, "_process", lambda row, seed: _here(row, seed))
    arguments = ["r8", "--forwards", "16", "--train", "16", "--held-out", "4", "--points", "1", "--devices", "2"]
    small = json.dumps({"local_steps": 4, "batch": 2})
    line = ["zeroth_order", *arguments, "--rows", "mezo core", "--set", small, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", line)

    def _here(row: str, seed: int) -> None:
        monkeypatch.setattr(sys, "argv", [*line, "--cell", row, str(seed)])
        zeroth_order.main()

    zeroth_order.main()
    told = json.loads((tmp_path / "mezo-core-0.cell.json").read_text())
    assert [point["forwards"] for point in told["points"]] == [0, 16]
    assert 0 <= told["points"][1]["accuracy"] <= 1 and told["points"][1]["loss"] != told["points"][0]["loss"]
    assert "| mezo core | 2,688 | 16 |" in capsys.readouterr().out
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    monkeypatch.setattr(zeroth_order, "_process", lambda *cell: pytest.fail("done again"))
    monkeypatch.setattr(sys, "argv", line)
    zeroth_order.main()


def test_the_table_gives_the_mean_and_spread_of_seeds() -> None:
    def cell(seed: int, loss: float) -> Cell:
        ends: Any = [Point(0, 0, 0.0, 0, 7.0, 0.0), Point(2, 100, 5.0, 300, loss, 0.5)]
        return Cell("mezo core", seed, 2688, 400_000_000, tuple(ends))

    said = zeroth_order.table([cell(0, 1.0), cell(1, 2.0)])
    assert "| mezo core | 2,688 | 100 | 1.500 ± 0.707 | 50 ± 0 % | 300 | 5 | 400 |" in said


def test_a_role_a_device_and_every_fifth_speech_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    roles = {f"KING {n} play": [f"speech {i} of {n} " * (n + 1) for i in range(10)] for n in range(5)}
    monkeypatch.setattr(texts, "shakespeare", lambda: roles)
    task = tasks.speeches(2, 0, 0, 0)
    assert list(task.devices) == ["device-0", "device-1"]
    assert [len(some) for some in task.devices.values()] == [8, 8]
    assert task.test[0].text.startswith("speech 0 of 4") and "speech 5 of 4" in task.test[0].text
    assert all("speech 5 " not in example.text for example in task.devices["device-0"])
