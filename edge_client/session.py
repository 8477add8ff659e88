"""What a client keeps in memory between rounds: the loaded engine, and each run's spec, codec and tokenized text."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_client import bases, data
from edge_client.adapters import Adapter, Base
from edge_client.banks import initial_of, layout_of, named, names_of
from edge_client.data import Example
from edge_client.engines import BROUGHT_BY, ENGINES, Tokens
from edge_client.methods import METHODS, Method
from edge_client.middle import Helper
from edge_client.ranks import rank_here
from edge_client.releases import Releases, Shelf
from edge_client.selection import selected
from edge_client.transport import Connection
from edge_client.view import View, fitting_rank, full_rank
from wire import spec
from wire.banks import banks
from wire.codecs.chain import Chain
from wire.delta import HISTORY, Layout, Vector, layer_number
from wire.errors import DataError, MissingExtra, Reason, Refused, SpecError
from wire.messages import Task
from wire.portion_rules import rule_of
from wire.run_spec import RunSpec, check_mode


@dataclasses.dataclass(frozen=True)
class Device:
    """What the person who started the client chose. `max_memory` in bytes, None for no limit; `record`: where deltas are
    written besides; `rank`: the largest rank that it tunes, in runs that let devices choose; `helper`: who computes the middle
    layers for the split engine; `domain`: the bank that its text belongs to, in runs that have several."""

    data: Path
    engine: str = "auto"
    base: Path | None = None
    max_memory: int | None = None
    threads: int | None = None
    record: Path | None = None
    rank: int | None = None
    helper: Helper | None = None
    domain: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Work:
    """Everything a task of one run needs on this device. `initial` is the start of the run's layout, `own` that of what is the
    device's own."""

    run: RunSpec
    view: View
    codec: Chain | None
    method: Method
    engine: Any
    releases: Releases
    initial: Vector
    train: list[Tokens]
    held_out: list[Tokens]
    examples: int
    record: Path | None = None
    own: Vector = dataclasses.field(default_factory=lambda: np.zeros(0, np.float32))
    domain: str | None = None

    @property
    def layout(self) -> Layout:
        """The run's."""
        return self.view.shared


class Session:
    """Loads lazily and once: two runs over the same base and adapter shape share one engine."""

    def __init__(self, device: Device, examples: Sequence[Example], shelf: Shelf | None = None) -> None:
        self._device, self._examples = device, examples
        self._described: dict[tuple[str, str, str], tuple[RunSpec, Layout]] = {}
        self._work: dict[str, Work] = {}
        self._releases = Releases(shelf=shelf)
        self._engines: dict[tuple[str, Adapter], Any] = {}

    def described(self, connection: Connection, task: Task) -> tuple[RunSpec, Layout]:
        """The spec and layout that a task names, asked for once: of a large model they are longer than an update.

        Raises Refused(WRONG_LAYOUT) for a coordinator that describes the run otherwise.
        """
        names = (task.run, task.spec_digest, task.layout_digest)
        if names not in self._described:
            run, layout = connection.describe(task.run)
            if (run.name, run.digest, layout.digest) != names:
                raise Refused(
                    Reason.WRONG_LAYOUT, f"the coordinator describes {task.run!r} otherwise than its task does"
                )
            self._described[names] = run, layout
        return self._described[names]

    def work(self, run: RunSpec, layout: Layout) -> Work:
        """What `run` needs here. Raises SpecError for a method this client does not have, BaseModelError for another
        base, MissingExtra for an engine that is not installed, DataError for too little text."""
        if run.digest not in self._work:
            self._work[run.digest] = self._prepare(run, layout)
        return self._work[run.digest]

    def _prepare(self, run: RunSpec, layout: Layout) -> Work:
        chosen = engine_class(self._device.engine, run, self._device.max_memory)
        method = fitting_method(run, chosen)
        train, held_out = data.split(list(self._examples), run.evaluation.fraction, run.seed)
        base = bases.find(run.base, self._device.base)
        adapter = method.tunes()
        if layout_of(run, adapter, base).digest != layout.digest:
            raise Refused(Reason.WRONG_LAYOUT, "the run's layout is not what its method makes of its base")
        rank = rank_here(run, method, base, self._device.rank, self._device.max_memory)
        view = view_of(run, adapter, base, rank)
        view = view if self._device.domain is None else named(run, view, self._device.domain)
        adapter = adapter if view.rank is None else adapter.narrowed(view.rank)
        engine = self._engine(chosen, base, adapter, view.layout)
        length = method.sequence_length
        measured = engine.tokenize(held_out, length)[: run.evaluation.max_sequences]
        training, first = engine.tokenize(train, length), adapter.initial(view.layout, run.seed, base)
        if not training or not measured:
            raise DataError(
                f"{self._device.data}: nothing to learn is left within the run's {length} tokens a sequence"
            )
        initial = initial_of(run, method.tunes(), base)
        own = view.own(first)
        learned = selected(engine, first, training, run.selection)
        texts = (learned, measured, len(train) if run.selection is None else len(learned))
        return Work(
            run, view, run.chain(), method, engine, self._releases, initial, *texts,
            record=self._device.record, own=own, domain=self._device.domain,
        )  # fmt: skip

    def _engine(self, chosen: Any, base: Base, adapter: Adapter, layout: Layout) -> Any:
        key = (base.identity, adapter)
        if key not in self._engines:
            self._engines.clear()  # one model in memory at a time
            helper = {} if self._device.helper is None else {"helper": self._device.helper}
            self._engines[key] = chosen.load(
                base, adapter, layout, self._device.max_memory, threads=self._device.threads, **helper
            )
        return self._engines[key]


def view_of(run: RunSpec, adapter: Adapter, base: Base, rank: int | None) -> View:
    """A run's layout as a device sees it that would tune `rank` at the most (None: all); of banks the first."""
    shared, rule = layout_of(run, adapter, base), rule_of(run)
    wanted = fitting_rank(rule, rank, full_rank(shared))
    narrowed = adapter if wanted is None else adapter.narrowed(wanted)
    return View(shared, rule, wanted, narrowed.personal(base), next(iter(banks(shared).values()), None))


GRADIENT_BYTES = 800 << 20
"""What gradients on the default base need at the least: below, a device is better off with losses alone."""


def engine_class(wanted: str, run: RunSpec, max_memory: int | None = None) -> Any:
    """The engine for a run: the toy for the toy base, else the one asked for. Raises MissingExtra, SpecError.

    `auto` takes torch where it is installed, the run wants gradients and `max_memory` bytes are enough for them, and onnx
    where losses are enough: it computes them in less memory.
    """
    toy = run.base.model == bases.TOY
    name = wanted if wanted != "auto" else (bases.TOY if toy else _fitting_engine(run, max_memory))
    if toy != (name == bases.TOY):
        raise SpecError(f"--engine {name} cannot compute on base {run.base.model!r}; use --engine auto")
    chosen: Any = spec.row_class(ENGINES, name, "--engine")
    if missing := chosen.missing():
        raise MissingExtra(missing, BROUGHT_BY.get(name, name))
    return chosen


def _fitting_engine(run: RunSpec, max_memory: int | None) -> str:
    ready = {name: not _missing(name) for name in ("onnx", "torch")}
    onnx_can = run.base.format == "int4-onnx" and any(m.forward_only for m in methods(run))
    gradients = any(not m.forward_only for m in methods(run))
    losses_do = onnx_can and ready["onnx"] and any(m.forward_only for m in methods(run))
    too_small = max_memory is not None and max_memory < GRADIENT_BYTES
    if gradients and ready["torch"] and not (too_small and losses_do):
        return "torch"
    return "onnx" if onnx_can and (ready["onnx"] or not ready["torch"]) else "torch"


def _missing(engine: str) -> bool:
    needed = {"onnx": ("onnxruntime",), "torch": ("torch", "transformers", "peft")}[engine]
    return any(importlib.util.find_spec(name) is None for name in needed)


def methods(run: RunSpec) -> list[Method]:
    """A run's method, and the one for devices that can only run the model forward, if it has one."""
    rows: list[Method] = [spec.build(METHODS, run.method, "method")]
    if run.forward_method is not None:
        rows.append(spec.build(METHODS, run.forward_method, "forward_method"))
    return rows


def settled(wanted: RunSpec, base: Base) -> tuple[RunSpec, Adapter]:
    """A run with its methods written out and the rules that follow from them: along which directions scalars are sent,
    and no codec if no method sends deltas. Raises SpecError for two methods that do not tune the same adapter."""
    rows = methods(wanted)
    _check_kinds(rows, base)
    directions = [found for row in rows if (found := row.directions()) is not None]
    if len({row.tunes().layout(base).digest for row in rows}) > 1:
        raise SpecError("method and forward_method tune different adapters: give both the same [adapter]")
    if len(set(directions)) > 1:
        described = " and ".join(f"{d.count} drawn by {d.drawn} in {d.bits} bits" for d in directions)
        raise SpecError(
            f"method and forward_method send scalars along other directions, {described}: a run has one set. Give both the"
            " same local_steps · perturbations, bits and subspace; beside hybrid the forward_method is mezo"
        )
    adapter = rows[0].tunes()
    _check_deltas(rows, adapter, base, wanted)
    history = any(tensor.role in HISTORY for tensor in adapter.layout(base).tensors)
    changed = dataclasses.replace(
        wanted,
        portions=wanted.portions or ({"id": "tuned"} if history else None),
        method=spec.plain(rows[0]),
        forward_method=spec.plain(rows[1]) if len(rows) > 1 else None,
        directions=directions[0] if directions else None,
        codec=wanted.codec if any(row.deltas for row in rows) else None,
    )
    if names_of(changed) and adapter.personal(base) is not None:
        raise SpecError(
            "portions: a run of banks has no personal tensors: the bank that fits is what a device has of its own"
        )
    check_mode(changed)
    return changed, adapter


def _check_deltas(rows: list[Method], adapter: Adapter, base: Base, wanted: RunSpec) -> None:
    """Raises SpecError for scalars along directions where devices see different parts of the adapter."""
    if adapter.personal(base) is None and wanted.portions is None:
        return
    if any(row.directions() is not None for row in rows):
        raise SpecError(
            "method: scalars along directions are of the whole adapter; personal tensors and portions need a method that"
            " sends deltas, such as lora"
        )


def _check_kinds(rows: list[Method], base: Base) -> None:
    """Raises SpecError for a method that no device could take part in as what it stands for."""
    if len(rows) > 1 and not rows[1].forward_only:
        fit = ", ".join(sorted(name for name in METHODS if spec.row_class(METHODS, name).forward_only))  # type: ignore[attr-defined]
        raise SpecError(f"forward_method.id: {rows[1].id!r} needs gradients; choose one of {fit}")
    if any(row.cuts for row in rows) and all(layer_number(module) is None for module in base.linears()):
        raise SpecError("method.id: hybrid needs a base with numbered layers to cut between; this one has none")


def fitting_method(run: RunSpec, engine: Any) -> Method:
    """The first of a run's methods that `engine` can drive. Raises SpecError if none is."""
    for method in methods(run):
        if method.forward_only or (engine.gradients and (engine.cuts or not method.cuts)):
            return method
    needed = "gradients, which this engine does not compute" if not engine.gradients else "gradients above a cut"
    raise SpecError(f"run {run.name!r} tunes by {needed}; use --engine torch, or give the run a [forward_method]")


def batch_seed(run: RunSpec, device: str, number: int) -> int:
    """The seed of a device's batches in a round: the same again after a restart, another for each device and round."""
    return int.from_bytes(hashlib.sha256(f"{run.seed}/{device}/{number}".encode()).digest()[:7], "big")
