"""What a client keeps in memory between rounds: the loaded engine, and each run's spec, codec and tokenized text."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_client import bases, data
from edge_client.data import Example
from edge_client.engines import ENGINES, Adapter, Base, GradEngine, Tokens
from edge_client.methods import METHODS, Method
from wire import spec
from wire.codecs.chain import Chain
from wire.delta import Layout
from wire.errors import DataError, MissingExtra, Reason, Refused, SpecError
from wire.run_spec import RunSpec


@dataclasses.dataclass(frozen=True)
class Device:
    """What the person who started the client chose. `max_memory` in bytes, None for no limit."""

    data: Path
    engine: str = "auto"
    base: Path | None = None
    max_memory: int | None = None
    threads: int | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """Everything a task of one run needs on this device."""

    run: RunSpec
    layout: Layout
    codec: Chain
    method: Method
    engine: GradEngine
    train: list[Tokens]
    held_out: list[Tokens]
    examples: int


class Session:
    """Loads lazily and once: two runs over the same base and adapter shape share one engine."""

    def __init__(self, device: Device, examples: Sequence[Example]) -> None:
        self._device, self._examples = device, examples
        self._work: dict[str, Work] = {}
        self._engines: dict[tuple[str, Adapter], GradEngine] = {}

    def work(self, run: RunSpec, layout: Layout) -> Work:
        """What `run` needs here. Raises SpecError for a method this client does not have, BaseModelError for another
        base, MissingExtra for an engine that is not installed, DataError for too little text."""
        if run.digest not in self._work:
            self._work[run.digest] = self._prepare(run, layout)
        return self._work[run.digest]

    def _prepare(self, run: RunSpec, layout: Layout) -> Work:
        method: Method = spec.build(METHODS, run.method, "method")
        codec = run.chain()
        train, held_out = data.split(list(self._examples), run.evaluation.fraction, run.seed)
        base = bases.find(run.base, self._device.base)
        if method.layout(base).digest != layout.digest:
            raise Refused(Reason.WRONG_LAYOUT, "the run's layout is not what its method makes of its base")
        engine = self._engine(run, base, method.adapter(base), layout)
        length = method.sequence_length
        measured = engine.tokenize(held_out, length)[: run.evaluation.max_sequences]
        training = engine.tokenize(train, length)
        if not training or not measured:
            raise DataError(
                f"{self._device.data}: nothing to learn is left within the run's {length} tokens a sequence"
            )
        return Work(run, layout, codec, method, engine, training, measured, len(train))

    def _engine(self, run: RunSpec, base: Base, adapter: Adapter, layout: Layout) -> GradEngine:
        key = (base.identity, adapter)
        if key not in self._engines:
            self._engines.clear()  # one model in memory at a time
            chosen = engine_class(self._device.engine, run)
            self._engines[key] = chosen.load(
                base, adapter, layout, self._device.max_memory, threads=self._device.threads
            )
        return self._engines[key]


def engine_class(wanted: str, run: RunSpec) -> Any:
    """The engine for a run: the toy for the toy base, else the one asked for. Raises MissingExtra, SpecError."""
    toy = run.base.model == bases.TOY
    name = wanted if wanted != "auto" else (bases.TOY if toy else "torch")
    if toy != (name == bases.TOY):
        raise SpecError(f"--engine {name} cannot compute on base {run.base.model!r}; use --engine auto")
    chosen: Any = spec.row_class(ENGINES, name, "--engine")
    if missing := chosen.missing():
        raise MissingExtra(missing, name)
    return chosen


def batch_seed(run: RunSpec, device: str, number: int) -> int:
    """The seed of a device's batches in a round: the same again after a restart, another for each device and round."""
    return int.from_bytes(hashlib.sha256(f"{run.seed}/{device}/{number}".encode()).digest()[:7], "big")
