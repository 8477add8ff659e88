"""Cells, of which an experiment is made: a folder each. What is finished is a file there, and is not done again."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wire.errors import MachineError, UserError
from wire.spec import Plain

try:
    import fcntl
except ImportError:  # Windows: the folder is not locked there
    fcntl = None  # type: ignore[assignment]

RESULT, SETTINGS, LOCK, ASIDE = "cell.json", "settings.json", "lock", ".aside"
TEXTS = "texts"
"""Of what a cell found: the SHA-256 of each text that it read from a file, by its name."""
NAMED = ("edgetune", "numpy", "torch", "transformers", "peft", "bitsandbytes", "numba", "grpcio", "protobuf", "lm-eval")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A row in one place (a link, a domain) with one seed."""

    row: str
    place: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.row}.{self.place.replace('/', '-')}.{self.seed}"


def grid(rows: Sequence[str], places: Sequence[str], seeds: int) -> list[Cell]:
    """Every cell once, seed by seed, so that an experiment that is cut short has whole seeds."""
    return list(dict.fromkeys(Cell(row, place, seed) for seed in range(seeds) for place in places for row in rows))


def by_row(wanted: Sequence[Cell]) -> list[Cell]:
    """In the order in which they are played where a row is of use in all places or not at all."""
    rows = list(dict.fromkeys(cell.row for cell in wanted))
    return sorted(wanted, key=lambda cell: (cell.seed, rows.index(cell.row)))


@contextlib.contextmanager
def opened(out: Path, wanted: Plain, texts: Mapping[str, str]) -> Iterator[Path]:
    """The folder of an experiment, this program's alone until the block is left. `texts`: name -> SHA-256.

    Raises UserError if it is one of other settings or texts, of a program that still runs, damaged, or something else, and
    MachineError where files cannot be locked."""
    if _is_foreign(out):
        raise UserError(f"{out}: is not a folder of an earlier experiment; choose another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: no folder can be made there: {error.strerror}; choose another --out") from error
    with (out / LOCK).open("ab") as lock:  # the system unlocks what a killed program had locked
        _take(lock.fileno(), out)
        text = json.dumps(wanted, indent=1, sort_keys=True)
        if (out / SETTINGS).exists():
            _check_same(out, settings(out), json.loads(text))
        _check_texts(out, texts)
        _write(out / SETTINGS, text)
        yield out


def _is_foreign(out: Path) -> bool:
    """Whether something is there that no experiment left, not even one that was killed as it began."""
    if not out.exists() or (out / SETTINGS).exists():
        return False
    began = {LOCK, Path(SETTINGS).with_suffix(ASIDE).name}
    return not out.is_dir() or any(path.name not in began for path in out.iterdir())


def _take(lock: int, out: Path) -> None:
    if fcntl is None:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{out}: another experiment is at work here; wait for it, or choose another --out") from error
    except OSError as error:
        raise MachineError(f"{out}: files cannot be locked here: {error.strerror}; choose another --out") from error


def settings(out: Path) -> Plain:
    """What all cells of a folder have in common. Raises UserError for a damaged file."""
    if (found := _read(out / SETTINGS)) is None:
        raise UserError(f"{out / SETTINGS}: is damaged; choose another --out, or remove this folder")
    return found


def _read(path: Path) -> Plain | None:
    """The JSON object of a file, None for a damaged one."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _check_same(out: Path, found: Plain, wanted: Plain) -> None:
    for key in sorted(found.keys() | wanted.keys()):
        if not _is_same(found.get(key), wanted.get(key)):
            raise UserError(
                f"{out}: its cells have {key} {found.get(key)!r}, not {wanted.get(key)!r}; choose another --out"
            )


def _is_same(found: Any, wanted: Any) -> bool:
    """Once a path was written down as it was typed."""
    return bool(found == wanted) or (isinstance(found, str) and str(Path(found).resolve()) == wanted)


def _check_texts(out: Path, texts: Mapping[str, str]) -> None:
    """Raises UserError where a finished cell has read another text by one of these names; older cells do not say."""
    for path in sorted(out.glob(f"cells/*/{RESULT}")):
        for name, digest in (_read(path) or {}).get(TEXTS, {}).items():
            if texts.get(name, digest) != digest:
                raise UserError(f"{out}: {name} is not the text that {path.parent.name} has read; choose another --out")


def done(out: Path, cell: Cell) -> Plain | None:
    """What a finished cell found; None for one that is not finished, or whose file is damaged: it is done again."""
    path = folder(out, cell) / RESULT
    found = _read(path) if path.exists() else None
    return found if found and dataclasses.asdict(cell).items() <= found.items() else None


def begun(out: Path, cell: Cell) -> Path:
    """An empty folder for a cell; what one that was broken off had left is gone."""
    made = folder(out, cell)
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    return made


def finish(out: Path, cell: Cell, found: Plain) -> None:
    """Write down what a cell found, whole or not at all. Raises UserError if a text has changed since other cells read it."""
    _check_texts(out, found.get(TEXTS, {}))
    table = dataclasses.asdict(cell) | found | {"machine": machine()}
    _write(folder(out, cell) / RESULT, json.dumps(table, indent=1))


def finished(out: Path, cells: Sequence[Cell]) -> list[Plain]:
    return [found for cell in cells if (found := done(out, cell)) is not None]


def folder(out: Path, cell: Cell) -> Path:
    return out / "cells" / cell.name


def _write(path: Path, text: str) -> None:
    aside = path.with_suffix(ASIDE)
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def machine() -> Plain:
    """What a figure depends on beside its settings."""
    return {
        "python": platform.python_version(), "system": platform.platform(), "processor": _processor(),
        "cores": os.cpu_count(), "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "packages": dict(_versions()),
    }  # fmt: skip


def _versions() -> Iterator[tuple[str, str]]:
    for name in NAMED:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def checked(named: Sequence[str], table: Mapping[str, Any], option: str) -> list[str]:
    """Names that are all in `table`, each once. Raises UserError for another."""
    for name in named:
        if name not in table:
            raise UserError(f"{option}: unknown {name!r}; choose of {', '.join(table)}")
    return list(dict.fromkeys(named))
