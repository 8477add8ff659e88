"""Cells, of which an experiment is made: a folder each. What is finished is a file there, and is not done again."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from wire.errors import UserError
from wire.spec import Plain

RESULT, SETTINGS = "cell.json", "settings.json"
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
    """Every cell, seed by seed, so that an experiment that is cut short has whole seeds."""
    return [Cell(row, place, seed) for seed in range(seeds) for place in places for row in rows]


def by_row(wanted: Sequence[Cell]) -> list[Cell]:
    """In the order in which they are played where a row is of use in all places or not at all."""
    rows = list(dict.fromkeys(cell.row for cell in wanted))
    return sorted(wanted, key=lambda cell: (cell.seed, rows.index(cell.row)))


def opened(out: Path, settings: Plain) -> Path:
    """The folder of an experiment. Raises UserError if it is one of other settings, or something else."""
    path, wanted = out / SETTINGS, json.dumps(settings, indent=1, sort_keys=True)
    if path.exists():
        _check_same(out, json.loads(path.read_text()), json.loads(wanted))
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: is not a folder of an earlier experiment; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    _write(path, wanted)
    return out


def settings(out: Path) -> Plain:
    """What all cells of a folder have in common."""
    found: Plain = json.loads((out / SETTINGS).read_text())
    return found


def _check_same(out: Path, found: Plain, wanted: Plain) -> None:
    for key in sorted(found.keys() | wanted.keys()):
        if found.get(key) != wanted.get(key):
            raise UserError(
                f"{out}: its cells have {key} {found.get(key)!r}, not {wanted.get(key)!r}; choose another --out"
            )


def done(out: Path, cell: Cell) -> Plain | None:
    """What a finished cell found, None for one that is not finished."""
    path = folder(out, cell) / RESULT
    found: Plain | None = json.loads(path.read_text()) if path.exists() else None
    return found


def begun(out: Path, cell: Cell) -> Path:
    """An empty folder for a cell; what one that was broken off had left is gone."""
    made = folder(out, cell)
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    return made


def finish(out: Path, cell: Cell, found: Plain) -> None:
    """Write down what a cell found, whole or not at all."""
    table = dataclasses.asdict(cell) | found | {"machine": machine()}
    _write(folder(out, cell) / RESULT, json.dumps(table, indent=1))


def finished(out: Path, cells: Sequence[Cell]) -> list[Plain]:
    return [found for cell in cells if (found := done(out, cell)) is not None]


def folder(out: Path, cell: Cell) -> Path:
    return out / "cells" / cell.name


def _write(path: Path, text: str) -> None:
    aside = path.with_suffix(".aside")
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
    """Names that are all in `table`. Raises UserError for another."""
    for name in named:
        if name not in table:
            raise UserError(f"{option}: unknown {name!r}; choose of {', '.join(table)}")
    return list(named)
