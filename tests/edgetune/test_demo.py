from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgetune.demo.report import Report, lines, table
from experiments.parts import parts
from wire.errors import DataError

REPORT = Report(
    clients=["a", "b-with-a-very-long-name-indeed"],
    base_loss=5.0,
    local_losses=[4.5, 4.6],
    federated_loss=4.25,
    rounds=2,
    local_steps=8,
    bytes_up_per_client_round=100.0,
    bytes_down_per_client_round=1000.0,
    float32_bytes=1000,
    wire_bytes_up=420,
    seconds=12.0,
    seconds_federated=8.0,
    peak_rss_mb=900,
    release_digests=["a" * 64],
    held_out_by_release=[5.0, None, 4.25],
    held_out_tokens=99,
    codec="int4",
    method="lora",
    model="m",
    seed=1,
)


def write(path: Path, count: int) -> Path:
    path.write_text("".join(json.dumps({"text": f"t{i}"}) + "\n\n" for i in range(count)))
    return path


def test_a_file_is_dealt_out_whole_in_blocks(tmp_path: Path) -> None:
    dealt = parts(str(write(tmp_path / "d.jsonl", 7)), 3)
    assert list(dealt) == ["part-1", "part-2", "part-3"]
    assert [json.loads(line)["text"] for part in dealt.values() for line in part] == [f"t{i}" for i in range(7)]
    assert min(map(len, dealt.values())) >= 2


def test_too_few_examples_for_so_many_clients_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="5 examples for 3 clients"):
        parts(str(write(tmp_path / "d.jsonl", 5)), 3)


def test_a_report_is_json_and_a_picture(tmp_path: Path) -> None:
    REPORT.write(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["federated_loss"] == 4.25
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_closing_table_has_a_row_for_everyone_and_says_what_was_saved() -> None:
    assert table(REPORT).row_count == 4
    assert "10.0 times smaller" in "\n".join(lines(REPORT))
