"""What coding leaves of the improvement: whole clients stay together, cells are done once, and rows are compared fairly."""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments import cells, domains, quality, quality_report
from experiments.cells import Cell
from experiments.rows import ROWS
from wire.codecs import chain
from wire.delta import Delta, Layout, Tensor
from wire.errors import DataError, MachineError, UserError
from wire.run_spec import parse


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two domains: in one, lines name their client."""
    made = tmp_path / "domains"
    made.mkdir()
    lines = [{"client": f"c{n % 7}", "instruction": f"say {n}", "output": f"word {n} " * 3} for n in range(70)]
    (made / "law.train.jsonl.gz").write_bytes(gzip.compress(text(lines)))
    (made / "law.test.jsonl").write_bytes(text(lines[:20]))
    plain = [{"text": f"plain {n} " * 4} for n in range(40)]
    (made / "notes.train.jsonl").write_bytes(text(plain))
    (made / "notes.test.jsonl").write_bytes(text(plain[:10]))
    return made


def text(lines: list[dict[str, str]]) -> bytes:
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def asked(folder: Path, out: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    line = ["--data", str(folder), "--out", str(out), "--model", "toy", "--domains", "law", "--length", "64"]
    return parser.parse_args([*line, "--rounds", "3", "--held-out", "8", "--learning-rate", "0.02", *more])


def test_clients_stay_together_and_every_line_is_dealt_once(folder: Path) -> None:
    dealt = domains.dealt(folder, "law", 3, seed=1)
    numbers = {name: {int(e.messages[0].content.split()[1]) for e in some} for name, some in dealt.items()}
    assert sorted(n for some in numbers.values() for n in some) == list(range(70))
    owners = [{n % 7 for n in some} for some in numbers.values()]
    assert sum(map(len, owners)) == 7
    assert domains.dealt(folder, "law", 3, seed=1) == dealt != domains.dealt(folder, "law", 3, seed=2)


def test_lines_of_nobody_are_dealt_one_by_one(folder: Path) -> None:
    assert [len(some) for some in domains.dealt(folder, "notes", 3, seed=0).values()] == [14, 13, 13]


def test_what_is_held_out_is_the_same_for_every_seed(folder: Path) -> None:
    assert domains.names(folder) == ["law", "notes"]
    assert domains.held_out(folder, "law") == domains.held_out(folder, "law")


def test_a_folder_without_domains_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no domains"):
        domains.names(tmp_path)


def test_a_study_compares_rows_and_is_not_done_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert quality.run(asked(folder, out, "--rows", "float32", "int4")) == 0
    whole, coded = json.loads((out / "report.json").read_text())["lines"]
    assert (whole["share"], whole["times_less"], whole["refused"]) == (1.0, 1.0, 0)
    assert whole["loss"] < whole["base_loss"] == coded["base_loss"]
    assert 0.9 < coded["share"] < 1.1
    assert whole["bits_up"] == pytest.approx(32.0, abs=0.5) and coded["bits_up"] < 6
    assert (out / "quality.png").read_bytes().startswith(b"\x89PNG")
    made = cells.folder(out, Cell("int4", "law", 0)) / cells.RESULT
    before = made.stat().st_mtime_ns
    assert quality.run(asked(folder, out, "--rows", "float32", "int4", "int8")) == 0
    assert made.stat().st_mtime_ns == before
    assert len(json.loads((out / "report.json").read_text())["cells"]) == 3


def test_a_row_is_never_compared_with_one_that_read_another_text(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    more = ["--rounds", "1", "--rows", "float32"]
    assert quality.run(asked(folder, out, *more)) == 0
    packed = (folder / "law.train.jsonl.gz").read_bytes()
    (folder / "law.train.jsonl").write_bytes(gzip.decompress(packed))  # the same text, in another file
    (folder / "notes.test.jsonl").write_bytes(text([{"text": "another domain"}] * 5))
    assert quality.run(asked(folder, out, *more, "float32", "--domains", "law", "notes")) == 0
    assert [line["seeds"] for line in json.loads((out / "report.json").read_text())["lines"]] == [1, 1]
    (folder / "law.train.jsonl").write_bytes(gzip.decompress(packed)[:-1])
    with pytest.raises(UserError, match=r"law is not the text that float32\.law\.0 has read; choose another --out"):
        quality.run(asked(folder, out, *more, "int4"))


def test_a_domain_that_cannot_be_read_has_no_digest_and_says_why(folder: Path) -> None:
    (folder / "law.train.jsonl.gz").write_bytes(b"no gzip")
    (folder / "lone.train.jsonl").write_bytes(text([{"text": "a"}] * 4))
    assert list(domains.digests(folder, ["law", "lone", "notes"])) == ["notes"]
    with pytest.raises(DataError, match=r"law\.train\.jsonl\.gz: cannot be read"):
        domains.read(folder, "law.train")


def test_training_that_diverges_ends_its_cell_and_is_reported(folder: Path, tmp_path: Path) -> None:
    args = asked(folder, tmp_path, "--rows", "float32", "--learning-rate", "100")
    found = quality.measured(Cell("float32", "law", 0), quality._settings(args), lambda _: None)
    assert found["refused"] == "round 1: OUT_OF_RANGE"
    assert [point["round"] for point in found["points"]] == [0]


def cell(row: str, seed: int, loss: float, sent: int) -> dict[str, Any]:
    points = [
        {"round": 0, "loss": 3.0},
        {"round": 2, "loss": loss, "bytes_up": sent, "bytes_down": sent, "seconds": 1.0},
    ]
    found = {"points": points, "parameters": 100, "devices": 4, "refused": None}
    return {"row": row, "place": "law", "seed": seed} | found


def test_shares_are_of_the_same_seed() -> None:
    found = [cell("float32", 0, 2.0, 3200), cell("int4", 0, 2.1, 400), cell("float32", 1, 1.0, 3200)]
    line = quality_report.made({}, [*found, cell("int4", 1, 1.4, 400)], "float32")["lines"][1]
    assert (line["share"], line["share_deviation"]) == (0.85, 0.0707)
    assert (line["bits_up"], line["times_less"], line["bytes_down"]) == (4.0, 8.0, 50)


def test_a_row_without_the_first_beside_it_has_no_share(tmp_path: Path) -> None:
    found = [cell("int4", 0, 2.1, 400), cell("float32", 1, 3.0, 3200), cell("int4", 1, 1.4, 400)]  # one gained nothing
    report = quality_report.made({}, found, "float32")
    coded = report["lines"][0]
    assert (report["reference"], coded["share"], coded["times_less"]) == ("float32", None, 8.0)
    alone = quality_report.made({}, found[:1], "float32")
    assert (alone["lines"][0]["share"], alone["lines"][0]["times_less"]) == (None, None)
    assert "| int4 | law | 1 | 3.0000 | 2.1000 | – |" in quality_report.markdown(alone)
    quality_report.write(alone, tmp_path)
    assert (tmp_path / "quality.png").read_bytes().startswith(b"\x89PNG")


def test_a_domain_that_fails_leaves_the_report_of_the_others(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "lone.train.jsonl").write_bytes(text([{"text": "plain " * 4}] * 9))
    line = asked(folder, tmp_path / "out", "--rounds", "1", "--rows", "float32", "--domains", "lone", "law", "--json")
    assert quality.run(line) == 1
    said = capsys.readouterr()
    assert [line["domain"] for line in json.loads(said.out)["lines"]] == ["law"]
    written, failed = said.err.rindex("written to"), said.err.rindex("has no lone.test.jsonl")
    assert written < failed
    with pytest.raises(MachineError, match=r"has no lone\.test\.jsonl"):
        quality.run(asked(folder, tmp_path / "none", "--rows", "float32", "--domains", "lone"))


def test_a_number_below_one_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--held-out must be at least 1"):
        quality.run(asked(folder, tmp_path, "--held-out", "0"))


@pytest.mark.parametrize("row", sorted(ROWS))
def test_every_row_is_one_of_a_run(row: str) -> None:
    table = {
        "name": "r",
        "base": {"model": "m", "format": "nf4"},
        "rounds": 1,
        "cohort": {"goal": 1},
        "method": {"id": "lora"},
    }
    assert parse(table | ROWS[row].spec).chain() is not None


BUDGET = [row for row in list(ROWS)[list(ROWS).index("ecsq") :] if not row.endswith("-up")]


@pytest.mark.parametrize("row", BUDGET)
def test_the_rows_to_compare_with_have_one_budget(row: str) -> None:
    layout = Layout((Tensor("a", (8, 4096), "lora_A"), Tensor("b", (4096, 8), "lora_B")))
    codec = chain.codec(ROWS[row].up)
    drawn = np.random.Generator(np.random.Philox(key=1)).laplace(size=layout.size).astype(np.float32) * 1e-3
    payload, _ = codec.encode(Delta(layout, drawn), codec.init(layout))
    assert 8 * len(payload) / layout.size == pytest.approx(0.2, rel=0.1)
