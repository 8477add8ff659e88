"""What this device can do, what would be picked for a run, and what that would cost: memory, seconds and bytes."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from edge_client import bases, data
from edge_client.adapters import Adapter, Base
from edge_client.engines import BROUGHT_BY, ENGINES, Tokens, cuts, torch_memory
from edge_client.methods import Method
from edge_client.methods.hybrid import Hybrid
from edge_client.participate import peak_rss_bytes
from edge_client.ranks import rank_here
from edge_client.session import GRADIENT_BYTES, engine_class, fitting_method, settled
from edge_client.transport import Connection
from quantize import QuantizedBase
from wire import run_spec, spec
from wire.codecs.chain import Chain
from wire.delta import Delta, Layout
from wire.errors import MachineError
from wire.run_spec import RunSpec
from wire.spec import Plain
from wire.split import HEAD

ANY: Plain = {"name": "doctor", "rounds": 1, "cohort": {"goal": 1}}
DEFAULT = run_spec.parse({**ANY, "base": {"model": "smollm2-135m", "format": "nf4"}, "method": {"id": "lora"}})
"""The run a device is judged by when none is given: `lora` as it stands, on the base that needs no hub."""
FORWARD = run_spec.parse(
    {
        **ANY,
        "base": {"model": "smollm2-135m", "format": "int4-onnx"},
        "method": {"id": "mezo"},
        "codec": None,
        "directions": {"drawn": "device", "count": 32},
    }
)
"""The run for a device that cannot do that: losses alone."""
MIB = 1 << 20
MEASURED_STEPS = 2
MEASURED_CALLS = 5


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The device. Bytes of memory and disk; `accelerator` is torch's name for a GPU, None without one or torch."""

    system: str
    machine: str
    python: str
    cores: int
    memory: int
    memory_free: int
    disk_free: int
    accelerator: str | None


@dataclasses.dataclass(frozen=True)
class Picked:
    """What would take part. `expected_memory` in bytes, None where the engine is too small to plan."""

    engine: str
    model: str
    format: str
    base: str
    base_bytes: int
    adapter_parameters: int
    sequences_at_once: int | None
    checkpointing: bool
    expected_memory: int | None
    method: str
    why: str
    gradient_layers: int | None = None
    """Of a method in hybrid order: the upper layers that get gradients here; the others are tuned by losses."""
    rank: int | None = None
    """In a run that lets devices choose: the rank that fits here, None for the run's."""


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of one round. `up` is what the run's codec makes of a delta of this layout, `float32` the same uncoded."""

    up: int
    down: int
    float32: int


@dataclasses.dataclass(frozen=True)
class Measured:
    """Seconds to load the base, to evaluate one sequence, for one local step (a gradient step, or a pair of ±ε forwards),
    and for a round's local steps."""

    load_s: float
    evaluate_sequence_s: float
    step_s: float
    round_s: float
    peak_memory: int


@dataclasses.dataclass(frozen=True)
class Link:
    """The way to a coordinator: the median round trip of a small call, in seconds."""

    coordinator: str
    round_trip_s: float


@dataclasses.dataclass(frozen=True)
class Report:
    """`problem` says why this device could not take part; what could not be known then is None."""

    hardware: Hardware
    engines: dict[str, str]
    picked: Picked | None
    traffic: Traffic | None
    measured: Measured | None
    problem: str | None
    link: Link | None = None


def suited(engine: str, max_memory: int | None) -> tuple[RunSpec, str]:
    """The run to judge a device by when none is given, and why: gradients where torch is installed and the memory is
    enough for them, else losses alone."""
    if engine == "onnx":
        return FORWARD, "the onnx engine was asked for, which computes losses alone"
    if engine == "torch":
        return DEFAULT, "the torch engine was asked for"
    torch: Any = spec.row_class(ENGINES, "torch") if _state("torch") == "ready" else None
    if torch is None and _state("onnx") == "ready":
        return FORWARD, "torch is not installed: no gradients, so losses alone on onnxruntime"
    limit = max_memory or _hardware().memory_free
    if limit < GRADIENT_BYTES and _state("onnx") == "ready":
        return FORWARD, f"{limit / MIB:,.0f} MiB are too few for gradients: losses alone on onnxruntime"
    return DEFAULT, "torch is installed and the memory is enough for gradients, which learn most a forward"


def examine(
    run: RunSpec,
    engine: str,
    folder: Path | None,
    max_memory: int | None,
    threads: int | None,
    measure: bool,
    why: str = "",
) -> Report:
    """Judge this device for `run`; with `measure`, by loading the base and taking real steps.

    Raises UserError for a run this client cannot understand, quantize's errors for a base that cannot be had.
    """
    hardware = _hardware()
    offered = {name: _state(name) for name in ENGINES}
    base = bases.find(run.base, folder)
    run, _ = settled(run, base)
    chosen = engine_class(engine, run, max_memory)
    method = fitting_method(run, chosen)
    limit = max_memory or hardware.memory_free
    rank = rank_here(run, method, base, None, limit)
    row = method.tunes() if rank is None else method.tunes().narrowed(rank)
    layout = row.layout(base)
    traffic = _traffic(run, layout, method, _below(base, method, layout, limit))
    try:
        picked = _picked(run, chosen, base, method, layout, limit, why or _why(chosen, method))
        picked = dataclasses.replace(picked, rank=rank)
        measured = _measure(chosen, base, method, row, layout, limit, threads) if measure else None
    except MachineError as error:
        return Report(hardware, offered, None, traffic, None, str(error))
    return Report(hardware, offered, picked, traffic, measured, None)


def _hardware() -> Hardware:
    import psutil

    memory = psutil.virtual_memory()
    return Hardware(
        system=f"{platform.system()} {platform.release()}",
        machine=platform.machine(),
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=memory.total,
        memory_free=memory.available,
        disk_free=shutil.disk_usage(Path.home()).free,
        accelerator=_accelerator(),
    )


def _accelerator() -> str | None:
    try:
        import torch
    except ImportError:
        return None
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return "Apple GPU (MPS)" if torch.backends.mps.is_available() else None


def link(connection: Connection) -> Link:
    """Ask a coordinator for its health a few times. Raises Unreachable."""
    connection.greet()  # the first call also connects
    took = []
    for _ in range(MEASURED_CALLS):
        began = time.perf_counter()
        connection.greet()
        took.append(time.perf_counter() - began)
    return Link(connection.address, statistics.median(took))


def _state(name: str) -> str:
    missing: str | None
    try:
        engine: Any = spec.row_class(ENGINES, name, "--engine")
        missing = engine.missing()
    except ModuleNotFoundError as error:
        missing = error.name
    return (
        "ready"
        if missing is None
        else f"{missing} is not installed: pip install 'edgetune[{BROUGHT_BY.get(name, name)}]'"
    )


def _traffic(run: RunSpec, layout: Layout, method: Method, below: int) -> Traffic:
    """`below`: how many tensors lie below a cut."""
    codec, scalars = run.chain(), run.directions.max_bytes() if run.directions else 0
    down = 4 * layout.size if codec else 20 + 4 * (run.directions.count if run.directions else 0)
    if codec is None or not method.deltas:
        return Traffic(scalars, down, 4 * layout.size)
    split = HEAD.size + scalars if below else 0
    return Traffic(split + _coded(codec, layout.above(below)), down, 4 * layout.size)


def _coded(codec: Chain, layout: Layout) -> int:
    """Bytes of a delta. A normal one stands for a real one: only an entropy coder would notice the difference."""
    values = np.random.Generator(np.random.Philox(key=0)).standard_normal(layout.size, np.float32) * np.float32(1e-3)
    payload, _ = codec.encode(Delta(layout, values), codec.init(layout))
    return len(payload)


def _below(base: Base, method: Method, layout: Layout, limit: int) -> int:
    """How many of the layout's tensors would lie below the cut here; none where the method makes no cut."""
    gradient_layers = _gradient_layers(base, method, layout, limit)
    if gradient_layers is None or not isinstance(base, QuantizedBase):
        return 0
    layers = int(_config(base).num_hidden_layers)
    return cuts.at(layout, max(0, layers - gradient_layers), layers).tensors


def _why(chosen: Any, method: Method) -> str:
    if method.forward_only:
        return "the run's method needs losses alone"
    return "the run's method needs gradients, and this engine computes them"


def _picked(run: RunSpec, chosen: Any, base: Base, method: Method, layout: Layout, limit: int, why: str) -> Picked:
    name = next(row for row, path in ENGINES.items() if path.endswith(":" + chosen.__name__))
    layers = _gradient_layers(base, method, layout, limit)
    plan = _plan(base, method, layout, limit, layers) if chosen.gradients else None
    expected = plan.expected if plan else None
    if name == "onnx" and isinstance(base, QuantizedBase):
        from edge_client.engines.onnx_engine import expected_memory

        expected = expected_memory(base, layout.size)
    return Picked(
        engine=name,
        model=run.base.model,
        format=run.base.format,
        base=base.identity,
        base_bytes=base.bytes_on_disk if isinstance(base, QuantizedBase) else 0,
        adapter_parameters=layout.size,
        sequences_at_once=plan.sequences if plan else None,
        checkpointing=plan.checkpoint if plan else False,
        expected_memory=expected,
        method=method.id,
        why=why,
        gradient_layers=layers,
    )


def _gradient_layers(base: Base, method: Method, layout: Layout, limit: int) -> int | None:
    if not isinstance(method, Hybrid) or not isinstance(base, QuantizedBase):
        return None
    sizes = (torch_memory.resident(base), layout.size, method.batch, method.sequence_length)
    return method.layers or torch_memory.affordable(_config(base), *sizes, limit)


def _plan(base: Base, method: Method, layout: Layout, limit: int, layers: int | None) -> torch_memory.Plan | None:
    if not isinstance(base, QuantizedBase):
        return None
    sizes = (torch_memory.resident(base), layout.size, method.batch, method.sequence_length)
    return torch_memory.plan(_config(base), *sizes, limit, layers)


def _config(base: QuantizedBase) -> SimpleNamespace:
    return SimpleNamespace(**json.loads((base.folder / "config.json").read_text(encoding="utf-8")))


def _measure(
    chosen: Any, base: Base, method: Method, row: Adapter, layout: Layout, limit: int, threads: int | None
) -> Measured:
    from edge_client.engines import Optimizer

    began = time.perf_counter()
    engine = chosen.load(base, row, layout, limit, threads=threads)
    loaded = time.perf_counter()
    batch = _full_batch(engine, method)
    engine.write(row.initial(layout, 0, base))
    engine.loss(batch[:1])
    once = time.perf_counter()
    engine.loss(batch)
    evaluated = (time.perf_counter() - once) / len(batch)
    start = row.initial(layout, 0, base)

    def one() -> None:
        if method.forward_only:
            engine.losses(batch, [start, start])
        else:
            engine.step(batch, 1e-4)

    if isinstance(method, Hybrid):
        engine.start_above(Optimizer(), method.layers, method.batch, method.sequence_length)
    elif not method.forward_only:
        engine.start(Optimizer())
    one()  # the first step also reserves memory
    once = time.perf_counter()
    for _ in range(MEASURED_STEPS):
        one()
    step = (time.perf_counter() - once) / MEASURED_STEPS
    return Measured(loaded - began, evaluated, step, step * method.local_steps, peak_rss_bytes())


def _full_batch(engine: Any, method: Method) -> list[Tokens]:
    """Sequences as long as the run allows: the most that a step can cost."""
    text = "The quick brown fox jumps over the lazy dog. " * (method.sequence_length * method.batch)
    sequences: list[Tokens] = engine.tokenize([data.Example(text=text)], method.sequence_length)
    return sequences[: method.batch]


def text(report: Report) -> str:
    """The report for people."""
    h = report.hardware
    said = [
        f"this device  {h.system}, {h.machine}, {h.cores} cores, Python {h.python}",
        f"             {_mib(h.memory_free)} of {_mib(h.memory)} memory free, {_mib(h.disk_free)} of disk free,"
        f" {h.accelerator or 'no GPU'}",
        *(f"engine       {name}: {state}" for name, state in report.engines.items()),
    ]
    if report.link is not None:
        way = report.link
        said.append(f"link         {way.coordinator} answers in {way.round_trip_s * 1000:.1f} ms (measured)")
    if report.problem:
        return "\n".join([*said, f"picked       nothing: {report.problem}"])
    assert report.picked is not None
    assert report.traffic is not None
    return "\n".join([*said, *_costs(report.picked, report.traffic, report.measured)])


def _costs(p: Picked, t: Traffic, m: Measured | None) -> list[str]:
    said = [f"picked       engine {p.engine} on {p.model} as {p.format}, {_mib(p.base_bytes)}, base {p.base[:12]}"]
    said.append(f"method       {p.method}: {p.why}")
    if p.rank is not None:
        said.append(f"             at rank {p.rank}, the largest that fits here; `client join --rank` takes another")
    if p.gradient_layers is not None:
        said.append(f"             gradients in the last {p.gradient_layers} layers, losses alone in those below")
    if p.expected_memory is not None and p.sequences_at_once is None:
        said.append(f"memory       {_mib(p.expected_memory)} expected")
    elif p.expected_memory is not None:
        how = "computing layers again in backward" if p.checkpointing else "keeping all activations"
        said.append(f"memory       {_mib(p.expected_memory)} expected, {p.sequences_at_once} sequences at once, {how}")
    said.append(
        f"bytes        {t.up:,} up and {t.down:,} down a round ({p.adapter_parameters:,} parameters, float32"
        f" would be {t.float32:,}: {t.float32 / t.up:.1f} times more up)"
    )
    if m is None:
        return [*said, "time         not measured (--quick)"]
    return [
        *said,
        f"time         {m.load_s:.1f} s to load once, {m.step_s:.2f} s a step, {m.round_s:.1f} s a round's local steps,"
        f" {m.evaluate_sequence_s:.2f} s to evaluate a sequence (measured)",
        f"             {_mib(m.peak_memory)} peak memory (measured)",
    ]


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f} MiB"
