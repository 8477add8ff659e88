"""`edgetune demo`: three clients on real text, one coordinator, and the same clients alone to compare with."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from edgetune.demo.report import Report, lines, table
from experiments.parts import SOURCES, parts
from experiments.processes import Event, Processes
from wire import run_spec
from wire.codecs.compositions import COMPOSITIONS
from wire.delta import Layout, Vector
from wire.errors import MissingExtra, UserError
from wire.messages import RunStatus
from wire.run_spec import RunSpec
from wire.spec import Plain

EXAMPLES = """\
examples:
  edgetune demo
  edgetune demo --method zo --engine onnx
  edgetune demo --method mixed
  edgetune demo --data reuters --clients 4 --rounds 2
  edgetune demo --data notes.jsonl --codec int4 --out mine
  edgetune demo --codec rotated_ecsq --downlink-codec rotated_ecsq

It writes report.json, loss.png and the tuned adapter to the --out folder, and beside them what every process said.
"""
FEDERATED = "federated"
MARK = ".edgetune-demo"
MIXED_FORWARDS = 3
"""Zeroth-order steps that a mixed demo's onnx client takes for one first-order step of a torch client."""
CLIENT_MEMORY = "1300M"
"""What each client may use: three of them, a coordinator and this process stay well below 6 GB."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    whats = f"{', '.join(SOURCES)}, or a file of JSON lines; default: %(default)s"
    parser.add_argument("--data", default="shakespeare", metavar="TEXT", help=whats)
    parser.add_argument(
        "--method", choices=sorted(MODES), default="lora",
        help="lora: by gradients; zo: by losses alone; mixed: half the clients by each; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--engine", choices=["auto", "onnx", "torch"], default="auto", help="default: %(default)s")
    parser.add_argument("--clients", type=int, metavar="N", help="default: 3, of a mixed demo 4")
    parser.add_argument("--rounds", type=int, metavar="N", help="default: 4, of a mixed demo 3")
    parser.add_argument("--local-steps", type=int, metavar="N", help="a round; default: by the method")
    parser.add_argument("--codec", default="top_k_int4", choices=sorted(COMPOSITIONS), help="default: %(default)s")
    parser.add_argument("--downlink-codec", choices=sorted(COMPOSITIONS), help="of releases; default: whole adapters")
    parser.add_argument("--model", default="smollm2-135m", metavar="MODEL", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="the report on standard output")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    mode = MODES[args.method]
    for name in ("clients", "rounds", "local_steps"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(mode, name))
    if args.engine == "onnx" and args.method in ("lora", "hybrid"):
        raise UserError("--engine onnx computes no gradients: choose --method zo or mixed with it")
    _check_installed(args.engine)
    console = Console(stderr=True)
    if not 1 <= args.clients <= 64:
        raise UserError("--clients must lie between 1 and 64")
    spec = _spec(args)
    names = _prepare(args)
    _base(args.model, mode.format, console)
    started = time.monotonic()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM)
    )  # leaves the block below, which ends its children
    with Processes(args.out) as processes:
        address = processes.coordinator()
        measured = _federate(spec, names, address, processes, args, console)
        console.print("measuring every model on the text of all clients", highlight=False)
        judged = _compare(spec, names, address, args)
    report = _report(spec, names, args, measured, judged, time.monotonic() - started)
    report.write(args.out)
    console.print(table(report))
    for line in lines(report):
        console.print(line, highlight=False)
    console.print(f"written to {args.out}: report.json, loss.png, adapter/", highlight=False)
    if args.json:
        print(json.dumps(dataclasses.asdict(report)))
    return 0


def _check_installed(engine: str) -> None:
    """Before anything starts: the demo needs a client, a coordinator and pictures."""
    tuning = ("onnxruntime",) if engine == "onnx" else ("torch", "transformers", "peft")
    for name in (*tuning, "psutil", "gguf", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(name, "onnx" if name == "onnxruntime" else "demo")


@dataclasses.dataclass(frozen=True)
class Mode:
    """What --method stands for. `alone`: every client also tunes alone, to compare with."""

    method: Plain
    forward_method: Plain | None
    format: str
    rounds: int
    local_steps: int
    clients: int
    alone: bool


CORE: Plain = {"id": "lora_sb", "rank": 8, "layers": 6}
"""Few parameters, in the upper layers: where losses alone find their way."""
LORA: Plain = {"id": "lora", "rank": 8, "alpha": 16.0, "batch": 4, "sequence_length": 128, "learning_rate": 1e-3}
ZO: Plain = {"id": "mezo", "adapter": CORE, "batch": 4, "sequence_length": 64, "learning_rate": 1e-2, "epsilon": 5e-3}
MODES = {
    "lora": Mode(LORA, None, "nf4", 4, 8, 3, alone=True),
    "hybrid": Mode(
        LORA | {"id": "hybrid", "layers": 10, "learning_rate_below": 1e-4}, None, "nf4", 4, 8, 3, alone=False
    ),
    "zo": Mode(ZO, None, "int4-onnx", 4, 40, 3, alone=False),
    "mixed": Mode(
        {"id": "lora", "adapter": CORE, "batch": 4, "sequence_length": 64, "learning_rate": 1e-2},
        ZO, "int4-onnx", 3, 8, 4, alone=False,
    ),
}  # fmt: skip


def _spec(args: argparse.Namespace) -> RunSpec:
    mode = MODES[args.method]
    forward = mode.forward_method and mode.forward_method | {"local_steps": MIXED_FORWARDS * args.local_steps}
    if args.downlink_codec and args.method == "zo":
        raise UserError("--downlink-codec: what --method zo publishes are steps, which no codec shortens")
    described: Plain = {
        "name": FEDERATED,
        "base": {"model": args.model, "format": mode.format},
        "rounds": args.rounds,
        "cohort": {"goal": args.clients, "minimum": args.clients},
        "method": mode.method | {"local_steps": args.local_steps},
        "codec": args.codec,
        "aggregator": {"id": "mean", "weight_by": "variance" if forward else "examples"},
        "evaluation": {"fraction": 0.1, "max_sequences": 8},
        "seed": args.seed,
    } | ({"forward_method": forward} if forward else {})
    return run_spec.recoded(run_spec.parse(described), downlink=args.downlink_codec)


def _engines(args: argparse.Namespace) -> list[str]:
    """Each client's --engine: in a mixed demo the second half cannot compute gradients."""
    if args.method != "mixed":
        return [args.engine] * args.clients
    return ["torch"] * (args.clients // 2) + ["onnx"] * (args.clients - args.clients // 2)


def _prepare(args: argparse.Namespace) -> list[str]:
    """A fresh --out folder with each client's data file; the clients' names."""
    dealt = parts(args.data, args.clients)
    if args.out.exists():
        if not (args.out / MARK).exists() and (not args.out.is_dir() or any(args.out.iterdir())):
            raise UserError(f"{args.out}: is not a folder of an earlier demo; choose another --out")
        shutil.rmtree(args.out)
    (args.out / "data").mkdir(parents=True)
    (args.out / MARK).touch()
    for name, texts in dealt.items():
        (args.out / "data" / f"{name}.jsonl").write_text("\n".join(texts) + "\n", encoding="utf-8")
    return list(dealt)


def _base(model: str, base_format: str, console: Any) -> None:
    import quantize

    with console.status(f"preparing {model} (downloaded and quantized once, then kept)"):
        quantize.cached_base(model, base_format)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the federated part of the demo cost; the most memory all its processes had together."""

    submitted: list[Event]
    seconds: float
    peak_rss_bytes: int


def _federate(
    spec: RunSpec, names: list[str], address: str, processes: Processes, args: argparse.Namespace, console: Any
) -> Measured:
    """Start the runs and the clients, and look on until all have ended."""
    from edge_client.transport import Connection
    from edgetune import runs

    alone = [
        dataclasses.replace(
            spec, name=f"alone-{i}", cohort=run_spec.Cohort(goal=1), codec=run_spec.parse_codec("float32")
        )
        for i in range(len(names))
        if MODES[args.method].alone
    ]
    with Connection(address, attended=True) as connection:
        for each in (spec, *alone):
            runs.create(connection, each)
    started = time.monotonic()
    more = ["--threads", "1", "--max-memory", CLIENT_MEMORY]
    for i, (name, engine) in enumerate(zip(names, _engines(args), strict=True)):
        wanted = [FEDERATED, *(run.name for run in alone[i : i + 1])]
        data = args.out / "data" / f"{name}.jsonl"
        processes.client(name, address, wanted, data, [*more, "--engine", engine])
    submitted: list[Event] = []
    ended = started
    with _screen(spec, names, args, console) as show:
        for event in processes.until_ended(names):
            show(event)
            if event["event"] == "submitted" and event["run"] == FEDERATED:
                submitted.append(event)
                ended = time.monotonic()
    return Measured(submitted, ended - started, processes.peak_rss_bytes)


def _screen(spec: RunSpec, names: list[str], args: argparse.Namespace, console: Any) -> Any:
    from edgetune.demo.screen import Screen

    steps = spec.rounds * args.local_steps
    more = {name: MIXED_FORWARDS for name, engine in zip(names, _engines(args), strict=True) if engine == "onnx"}
    each = [steps * (2 if MODES[args.method].alone else more.get(name, 1)) for name in names]
    return Screen(names, each, FEDERATED, console)


@dataclasses.dataclass(frozen=True)
class Judged:
    """What the comparison found. Losses in nats a token: of the base, of every client alone, of what they tuned together."""

    base_loss: float
    local_losses: list[float]
    federated_loss: float
    parameters: int
    tokens: int
    status: RunStatus


def _compare(spec: RunSpec, names: list[str], address: str, args: argparse.Namespace) -> Judged:
    """Every adapter on the held-out text of all clients together, by one engine; the federated one is written down."""
    from edge_client import bases, export
    from edge_client.session import engine_class, methods

    base = bases.find(spec.base)
    method = methods(spec)[0]
    row = method.tunes()
    layout = row.layout(base)
    initial = row.initial(layout, spec.seed, base)
    alone = [f"alone-{i}" for i in range(len(names))] if MODES[args.method].alone else []
    adapters, status = _tuned([*alone, FEDERATED], address, layout, initial)
    engine = engine_class("auto", spec).load(base, row, layout, threads=2)
    held_out = _held_out(engine, spec, names, method.sequence_length, args.out / "data")
    losses = [_loss(engine, adapter, held_out) for adapter in (initial, *adapters)]
    placement = row.placement(base)
    write = export.to_merged if placement.gains else export.to_peft
    write(base, placement, layout, adapters[-1], args.out / "adapter")
    tokens = sum(sequence.targets for sequence in held_out)
    return Judged(losses[0], losses[1:-1], losses[-1], layout.size, tokens, status)


def _tuned(runs: list[str], address: str, layout: Layout, initial: Vector) -> tuple[list[Vector], RunStatus]:
    """The newest adapter of each run, float32 [layout.size], and the status of the last."""
    from edge_client.releases import Releases
    from edge_client.transport import Connection

    with Connection(address) as connection:
        described = [connection.describe(run)[0] for run in runs]
        held = [Releases().fetch(connection, spec, layout, initial) for spec in described]
        return [found.trajectory.adapter for found in held], connection.status(runs[-1])


def _held_out(engine: Any, spec: RunSpec, names: list[str], length: int, folder: Path) -> list[Any]:
    """What no client trained on, tokenized."""
    from edge_client import data

    evaluation, sequences = spec.evaluation, list[Any]()
    for name in names:
        _, kept = data.split(data.read(folder / f"{name}.jsonl"), evaluation.fraction, spec.seed)
        sequences += engine.tokenize(kept, length)[: evaluation.max_sequences]
    return sequences


def _loss(engine: Any, adapter: Vector, held_out: list[Any]) -> float:
    engine.write(adapter)
    total, tokens = engine.loss(held_out)
    return float(total / tokens)


def _report(
    spec: RunSpec, names: list[str], args: argparse.Namespace, measured: Measured, judged: Judged, seconds: float
) -> Report:
    trained = [event for event in measured.submitted if event["kind"] == "train"]
    return Report(
        clients=names,
        base_loss=judged.base_loss,
        local_losses=judged.local_losses,
        federated_loss=judged.federated_loss,
        rounds=spec.rounds,
        local_steps=args.local_steps,
        bytes_up_per_client_round=sum(e["bytes_up"] for e in trained) / len(trained),
        bytes_down_per_client_round=sum(e["bytes_down"] for e in trained) / len(trained),
        float32_bytes=4 * judged.parameters,
        wire_bytes_up=sum(max(e["wire_up"] for e in measured.submitted if e["client"] == name) for name in names),
        seconds=round(seconds, 1),
        seconds_federated=round(measured.seconds, 1),
        peak_rss_mb=measured.peak_rss_bytes >> 20,
        release_digests=[release.digest for release in judged.status.releases],
        held_out_by_release=[release.held_out_loss for release in judged.status.releases],
        held_out_tokens=judged.tokens,
        codec=args.codec,
        method=args.method,
        model=args.model,
        seed=args.seed,
    )
