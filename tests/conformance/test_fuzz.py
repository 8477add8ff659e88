"""What `make fuzz` and `make fuzz-guided` may be asked for."""

from __future__ import annotations

import contextlib
import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conformance import fuzz
from wire.codecs import kernels

GUIDED = "tests.conformance.fuzz_guided"


@pytest.fixture
def guided(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """`fuzz_guided` where atheris may be missing: its arguments need none."""
    instrumented = SimpleNamespace(instrument_imports=lambda include: contextlib.nullcontext())
    monkeypatch.setitem(sys.modules, "atheris", instrumented)
    monkeypatch.setattr(kernels, "LARGE", kernels.LARGE)  # it is changed by the import
    sys.modules.pop(GUIDED, None)
    module = importlib.import_module(GUIDED)
    del sys.modules[GUIDED]
    return SimpleNamespace(main=module.main)


WRONG = ("0", "-5", "1.5", "many")


def refused(program: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["fuzz", *words])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2


@pytest.mark.parametrize("number", WRONG)
def test_fewer_payloads_than_one_are_refused(number: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(SimpleNamespace(main=fuzz.main), monkeypatch, "--payloads", number)


@pytest.mark.parametrize("number", WRONG)
def test_less_than_a_second_is_refused(number: str, guided: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(guided, monkeypatch, "--seconds", number)


def test_a_file_is_refused_for_a_folder(
    guided: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    for program in (SimpleNamespace(main=fuzz.main), guided):
        for path in (tmp_path / "file", tmp_path / "file" / "within"):
            refused(program, monkeypatch, "--out", str(path))
            assert "is a file, or lies in one" in capsys.readouterr().err


def test_a_folder_that_is_missing_is_taken(tmp_path: Path) -> None:
    assert fuzz.folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert fuzz.folder("fuzz-out") == Path("fuzz-out")
