"""An experiment's folder: cells once each, of one set of settings, one program at a time, whatever had ended the last."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from experiments import cells
from experiments.cells import Cell
from wire.errors import UserError

SETTINGS = {"rounds": 1}
CELL = Cell("int4", "law", 0)
HOLDER = """
import sys, time
from pathlib import Path
from experiments import cells
with cells.opened(Path(sys.argv[1]), {"rounds": 1}, {}):
    print("open", flush=True)
    time.sleep(60)
"""


def test_cells_come_seed_by_seed() -> None:
    assert cells.grid(["a", "b"], ["1/5"], 2) == [
        Cell("a", "1/5", 0), Cell("b", "1/5", 0), Cell("a", "1/5", 1), Cell("b", "1/5", 1)
    ]  # fmt: skip


def test_what_is_named_twice_is_there_once() -> None:
    assert cells.grid(["int4", "int4"], ["law", "law"], 1) == [CELL]
    assert cells.checked(["int4", "int8", "int4"], {"int4": 0, "int8": 0}, "--rows") == ["int4", "int8"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="not a folder of an earlier experiment"), cells.opened(tmp_path, SETTINGS, {}):
        pass
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("thesis.txt", "years")]


def test_a_folder_of_other_settings_is_refused_by_their_name(tmp_path: Path) -> None:
    with cells.opened(tmp_path, SETTINGS, {}):
        pass
    with pytest.raises(UserError, match="its cells have rounds 1, not 2"), cells.opened(tmp_path, {"rounds": 2}, {}):
        pass


def test_a_path_that_was_written_down_as_it_was_typed_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with cells.opened(tmp_path / "out", {"data": "notes.jsonl"}, {}):
        pass
    with cells.opened(tmp_path / "out", {"data": str(tmp_path / "notes.jsonl")}, {}) as out:
        assert cells.settings(out) == {"data": str(tmp_path / "notes.jsonl")}


def test_a_folder_takes_texts_as_they_come_and_refuses_one_that_has_changed_by_name(tmp_path: Path) -> None:
    with cells.opened(tmp_path, SETTINGS, {"law": "aa"}) as out:
        finish(out, CELL, {"law": "aa"})
        finish(out, Cell("int4", "code", 0), {"code": "bb"})
        with pytest.raises(UserError, match=r"law is not the text that int4\.law\.0 has read"):  # it changed meanwhile
            finish(out, Cell("int8", "law", 0), {"law": "cc"})
        assert cells.done(out, Cell("int8", "law", 0)) is None
    refused = pytest.raises(UserError, match=r"code is not the text that int4\.code\.0 has read; choose another --out")
    with refused, cells.opened(tmp_path, SETTINGS, {"law": "aa", "code": "cc"}):
        pass
    with cells.opened(tmp_path, SETTINGS, {"law": "aa", "medicine": "dd"}):
        pass


def test_cells_that_do_not_say_what_they_have_read_are_taken(tmp_path: Path) -> None:
    with cells.opened(tmp_path, SETTINGS, {}) as out:
        cells.begun(out, CELL)
        cells.finish(out, CELL, {"loss": 1.0})
    with cells.opened(tmp_path, SETTINGS, {"law": "aa"}) as out:
        assert cells.done(out, CELL) is not None


def finish(out: Path, cell: Cell, texts: dict[str, str]) -> None:
    cells.begun(out, cell)
    cells.finish(out, cell, {cells.TEXTS: texts})


def test_what_a_program_that_was_killed_as_it_began_had_left_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / cells.LOCK).touch()
    (tmp_path / "settings.aside").write_text('{"rou')
    with cells.opened(tmp_path, SETTINGS, {}) as out:
        assert cells.settings(out) == SETTINGS


def test_one_program_at_a_time_works_in_a_folder_and_one_that_was_killed_holds_nobody_up(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "open\n"
        refused = pytest.raises(UserError, match=f"{tmp_path}: another experiment is at work here")
        with refused, cells.opened(tmp_path, SETTINGS, {}):
            pass
        holder.kill()
        holder.wait()
        with cells.opened(tmp_path, SETTINGS, {}) as out:
            assert out == tmp_path
    finally:
        holder.kill()
        holder.wait()


@pytest.mark.parametrize("left", [b"", b"[1", b"[1]", b"\xff\xfe", b"\x00" * 20])
def test_damaged_settings_are_refused_by_the_name_of_their_file(left: bytes, tmp_path: Path) -> None:
    (tmp_path / cells.SETTINGS).write_bytes(left)
    with pytest.raises(UserError, match=r"settings\.json: is damaged"), cells.opened(tmp_path, SETTINGS, {}):
        pass
    assert (tmp_path / cells.SETTINGS).read_bytes() == left


@pytest.mark.parametrize("left", ["", "{", "{}", "[]", '{"row": "int4", "place": "code", "seed": 0}'])
def test_a_cell_whose_file_is_damaged_is_not_done(left: str, tmp_path: Path) -> None:
    cells.begun(tmp_path, CELL)
    cells.finish(tmp_path, CELL, {"loss": 1.0})
    whole = cells.done(tmp_path, CELL)
    assert whole is not None and whole["loss"] == 1.0
    (cells.folder(tmp_path, CELL) / cells.RESULT).write_text(left)
    assert cells.done(tmp_path, CELL) is None
    assert cells.finished(tmp_path, [CELL]) == []
