"""Deltas that clients recorded (`edgetune client join --record-deltas`), read back in groups that a coordinator would combine."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from quantize.tensors import SafeTensors
from wire.delta import Delta, Layout, Role, Tensor, Vector
from wire.errors import UserError

ROLES: Mapping[str, Role] = {".lora_A.": "lora_A", ".lora_B.": "lora_B"}
FLOATS = ("F32", "F16", "F64")
"""What a delta may be kept in."""


@dataclasses.dataclass(frozen=True, eq=False)
class Group:
    """Deltas of one round of one run, all from one release; `name` says which, `devices` whose. Their layout is one."""

    name: str
    devices: tuple[str, ...]
    deltas: tuple[Delta, ...]

    def __str__(self) -> str:
        return self.name if self.devices == (self.name,) else f"{self.name}: {', '.join(self.devices)}"


def found(paths: Sequence[Path]) -> list[Path]:
    """The safetensors files that are named, or lie in folders that are. Raises UserError where there is none."""
    several = [sorted(path.rglob("*.safetensors")) if path.is_dir() else [path] for path in paths]
    if not (files := list(dict.fromkeys(itertools.chain(*several)))):
        raise UserError(f"{', '.join(map(str, paths))}: no safetensors files")
    return files


def grouped(files: Sequence[Path]) -> list[Group]:
    """The deltas of some files in groups, in the order of their first files; a file that does not say whose it is, is one alone.

    Raises UserError for a file that is no delta, two of one device, and groups whose tensors differ or cancel out.
    """
    groups: dict[tuple[str, ...], dict[str, Delta]] = {}
    for path in files:
        file = SafeTensors(path)
        mine = groups.setdefault(_whose(file), {})
        device = str(file.metadata.get("device", path))
        if device in mine:
            raise UserError(f"{path}: the second delta of device {device} in {_name(_whose(file))}; leave one out")
        mine[device] = _delta(file)
    return [_group(_name(whose), mine) for whose, mine in groups.items()]


def _whose(file: SafeTensors) -> tuple[str, ...]:
    """What the files of a group have in common. Runs of one name at two coordinators differ in releases or in spec."""
    told = file.metadata
    if "run" not in told or "round" not in told:
        return (str(file.path),)
    return tuple(str(told.get(key, "")) for key in ("run", "round", "base", "spec"))


def _name(whose: tuple[str, ...]) -> str:
    match whose:
        case (run, number, base, spec):
            parts = (f"run {run}", f"round {number}", base and f"from release {base[:8]}", spec and f"spec {spec[:8]}")
            return ", ".join(filter(None, parts))
    return whose[0]


def _group(name: str, mine: Mapping[str, Delta]) -> Group:
    deltas = tuple(mine.values())
    if len({delta.layout.digest for delta in deltas}) > 1:
        raise UserError(f"{name}: the files of {', '.join(mine)} have different tensors; measure them one by one")
    if not np.any(np.sum([delta.vector for delta in deltas], axis=0, dtype=np.float64)):
        raise UserError(f"{name}: the deltas of {', '.join(mine)} cancel out: their mean has no error relative to it")
    return Group(name, tuple(mine), deltas)


def _delta(file: SafeTensors) -> Delta:
    """What a file has. Raises UserError for what no device could have sent."""
    parts = {name: _entries(file, name) for name in file.names()}
    if not parts:
        raise UserError(f"{file.path}: no tensors in it")
    vector = np.concatenate([part.reshape(-1) for part in parts.values()])
    if not vector.any():
        raise UserError(f"{file.path}: all entries are zero, so that nothing is relative to them; leave the file out")
    tensors = tuple(Tensor(name, part.shape, _role(name)) for name, part in parts.items())
    try:
        return Delta(Layout(tensors), vector)
    except ValueError as error:
        raise UserError(f"{file.path}: {error}") from error


def _entries(file: SafeTensors, name: str) -> Vector:
    """A tensor in float32. Raises UserError by the names of file and tensor."""
    where, shape = f"{file.path}: tensor {name!r}", file.shape(name)
    if not shape or min(shape) < 1:
        raise UserError(f"{where} has the shape {list(shape)}; expected positive numbers, at least one")
    if file.dtype(name) not in FLOATS:
        raise UserError(f"{where} is of {file.dtype(name)}; expected one of {', '.join(FLOATS)}")
    with np.errstate(over="ignore"):  # what is too large for float32 is refused below
        entries: Vector = file.read(name).astype(np.float32)
    if not np.isfinite(entries).all():
        raise UserError(f"{where} has an entry that is not a finite number in float32")
    return entries


def _role(name: str) -> Role:
    return next((role for part, role in ROLES.items() if part in name), "other")
