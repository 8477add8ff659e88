"""Federations behind slow links: real processes, cells that are done once, and a report that says what the cells say."""

from __future__ import annotations

import argparse
import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments import bandwidth, bandwidth_report, cells
from experiments.processes import STARTED, end_orphans
from tests.processes import write_texts
from wire.errors import UserError


def asked(out: Path, data: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    bandwidth.add_arguments(parser)
    line = ["--out", str(out), "--data", str(data), "--clients", "2", "--rounds", "1", "--links", "20/50", *more]
    return parser.parse_args(line)


def release(version: int, loss: float | None, seconds: float) -> dict[str, Any]:
    wire = {"wire_up": 1_000_000 * version, "wire_down": 0}
    return {"version": version, "loss": loss, "seconds": seconds} | wire


def cell(row: str, losses: list[float | None], seconds: float = 1.0) -> dict[str, Any]:
    total = {"payload_up": 10, "payload_down": 20, "wire_up": 2_000_000, "wire_down": 3_000_000}
    releases = [release(v, loss, seconds * v) for v, loss in enumerate(losses)]
    found = {"releases": releases, "total": total, "overhead_bytes": 500.0, "machine": {"cores": 2}}
    return {"row": row, "place": "1/5", "seed": 0} | found


SETTINGS = {"clients": 3, "rounds": 3, "model": "<toy>", "round_trip_ms": 40.0}


def test_a_federation_behind_links_is_measured_once(tmp_path: Path) -> None:
    data, out = write_texts(tmp_path / "texts.jsonl", "abc", 24), tmp_path / "out"
    assert bandwidth.run(asked(out, data, "--rows", "float32", "int4")) == 0
    report = json.loads((out / "report.json").read_text())
    whole, coded = report["cells"]
    assert whole["releases"][-1]["loss"] < whole["releases"][0]["loss"]
    assert whole["total"]["payload_up"] > 2 * 4 * whole["parameters"]
    assert 0 < whole["overhead_bytes"] < 5000
    assert coded["total"]["wire_up"] < whole["total"]["wire_up"] / 5
    assert all(c["total"]["wire_up"] > c["total"]["payload_up"] > 0 for c in report["cells"])
    made = [(out / "cells" / name / cells.RESULT).stat().st_mtime_ns for name in ("float32.20-50.0", "int4.20-50.0")]
    (out / "cells" / "int4.20-50.0" / cells.RESULT).unlink()
    assert bandwidth.run(asked(out, data, "--rows", "float32", "int4")) == 0
    again = [(out / "cells" / name / cells.RESULT).stat().st_mtime_ns for name in ("float32.20-50.0", "int4.20-50.0")]
    assert again[0] == made[0] and again[1] > made[1]
    with pytest.raises(UserError, match="rounds 1, not 2"):
        bandwidth.run(asked(out, data, "--rounds", "2"))
    write_texts(data, "xyz", 24)
    with pytest.raises(UserError, match=r"texts\.jsonl is not the text that float32\.20-50\.0 has read"):
        bandwidth.run(asked(out, data, "--rows", "int8"))


def test_settings_name_data_so_that_it_is_found_from_every_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert bandwidth._settings(asked(tmp_path, Path("notes.jsonl")))["data"] == str(tmp_path / "notes.jsonl")
    assert bandwidth._settings(asked(tmp_path, Path("shakespeare")))["data"] == "shakespeare"


def test_what_a_killed_experiment_left_is_ended_and_nobody_else(tmp_path: Path) -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    mine, other = subprocess.Popen(sleeper), subprocess.Popen(sleeper)
    try:
        from experiments.processes import _created

        (tmp_path / STARTED).write_text(f"{mine.pid} {_created(mine.pid)}\n{other.pid} 12.5\n99999999 0.0\n")
        end_orphans(tmp_path)
        assert mine.wait(20) < 0
        assert other.poll() is None
    finally:
        mine.kill()
        other.kill()
        mine.wait()
        other.wait()


def test_a_row_is_compared_with_the_first_of_its_link() -> None:
    report = bandwidth_report.made(
        SETTINGS, [cell("float32", [5.0, 4.5, 4.0], 10.0), cell("int4", [5.0, 4.6, 4.05])], 0.9
    )
    whole, coded = report["lines"]
    assert (whole["gain_share"], whole["seconds_to_target"], whole["wire_mb_to_target"]) == (1.0, 20.0, 2.0)
    assert (coded["gain_share"], coded["seconds_to_target"], coded["wire_mb_to_target"]) == (0.95, 2.0, 2.0)


def test_a_target_that_is_missed_is_never_reached() -> None:
    report = bandwidth_report.made(SETTINGS, [cell("float32", [5.0, 4.0]), cell("int4", [5.0, None, 4.2])], 0.9)
    assert report["lines"][1]["seconds_to_target"] is None
    assert "never at the target" in bandwidth_report.shown(report["lines"][1])


def test_the_page_needs_nothing_beside_it(tmp_path: Path) -> None:
    report = bandwidth_report.made(SETTINGS, [cell("float32", [5.0, 4.0])], 0.9)
    bandwidth_report.write(copy.deepcopy(report), tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r'(?:src|href)="(?!data:)', page) == [] and "http" not in page
    assert "&lt;toy&gt;" in page and "<toy>" not in page
    assert (tmp_path / "report.csv").read_text().splitlines()[1].startswith("float32,1/5,1,4.0,1.0,")


@pytest.mark.parametrize("link", ["5", "0/5", "a/b", "1/2/3", "-1/5"])
def test_a_link_that_is_no_pair_of_rates_is_refused(link: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"--links {link!r}")):
        bandwidth.run(asked(tmp_path, tmp_path / "none", f"--links={link}"))


@pytest.mark.parametrize("line", ["12", "12 x", "-1 0.5", "\x00\x00"])
def test_a_line_that_a_power_cut_left_in_part_ends_nobody(line: str, tmp_path: Path) -> None:
    (tmp_path / STARTED).write_text(line)
    end_orphans(tmp_path)
