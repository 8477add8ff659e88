"""Deltas written down as they are before any codec, for experiments: `edgetune client join --record-deltas DIR`."""

from __future__ import annotations

from pathlib import Path

from wire.delta import Delta
from wire.errors import MachineError
from wire.messages import Task


def write(folder: Path, delta: Delta, task: Task, device: str) -> Path:
    """A safetensors file of float32 tensors under their PEFT names; whose it is stands in its metadata.

    Raises MachineError where the folder cannot be written.
    """
    from quantize import tensors  # needed here alone: clients on small machines count megabytes

    path = folder / f"{task.run}-{task.round:04}-{device}.safetensors"
    declared = {tensor.name: ("F32", tensor.shape) for tensor in delta.layout.tensors}
    whose = {"run": task.run, "round": str(task.round), "device": device, "base": task.release_digest}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors.write(path, declared, delta.layout.split(delta.vector).values(), whose)
    except OSError as error:
        raise MachineError(f"{path}: cannot be written: {error.strerror}") from error
    return path
