"""Deltas written down as they are before any codec, for experiments: `edgetune client join --record-deltas DIR`."""

from __future__ import annotations

import contextlib
from pathlib import Path

from wire.delta import Delta
from wire.durable import make_folder
from wire.errors import MachineError, UserError
from wire.messages import Task


def prepare(folder: Path) -> None:
    """Make the folder, and try it. Raises UserError where nothing can be written into it."""
    import tempfile  # needed here alone: it brings shutil, and with it three compressors

    try:
        make_folder(folder)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(b"\0")
    except OSError as error:
        raise UserError(f"--record-deltas {folder}: cannot be written into: {error.strerror}") from error


def write(folder: Path, delta: Delta, task: Task, device: str) -> Path:
    """A safetensors file of float32 tensors under their PEFT names, whole or not at all; whose it is stands in its metadata.

    Raises MachineError where it cannot be written.
    """
    from quantize import tensors  # needed here alone: clients on small machines count megabytes

    path = folder / f"{task.run}-{task.round:04}-{device}.safetensors"
    aside = path.with_name(path.name + ".aside")
    declared = {tensor.name: ("F32", tensor.shape) for tensor in delta.layout.tensors}
    whose = {
        "run": task.run, "round": str(task.round), "device": device, "base": task.release_digest, "spec": task.spec_digest,
    }  # fmt: skip
    try:
        tensors.write(aside, declared, delta.layout.split(delta.vector).values(), whose)
        aside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise MachineError(f"{path}: cannot be written: {error.strerror}") from error
    return path
