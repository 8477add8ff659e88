"""A figure that makes no sense is refused where it is typed, by its option's name, before a folder is made."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune.cli import main

WRONG = [
    (["quality", "--data", "d"], "--learning-rate", ["nan", "inf", "0", "-1", "fast"]),
    (["bandwidth"], "--target", ["nan", "2", "0", "most"]),
    (["bandwidth"], "--round-trip-ms", ["nan", "inf", "-1", "long"]),
    (["bandwidth"], "--cut-every-s", ["nan", "inf", "-0.5"]),
    (["benchmark"], "--target", ["nan", "2", "0"]),
]


@pytest.mark.parametrize(("words", "option", "value"), [(w, o, value) for w, o, values in WRONG for value in values])
def test_what_is_no_figure_of_an_option_is_refused_by_its_name(
    words: list[str],
    option: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["experiment", *words, f"{option}={value}"]) == 2
    assert f"argument {option}: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
