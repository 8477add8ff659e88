"""`edgetune demo`: three clients on real text, one coordinator, and the same clients alone to compare with."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import shutil
import time
from pathlib import Path
from typing import Any

from edgetune.demo.federation import Event, Processes
from edgetune.demo.texts import SOURCES, parts
from wire import run_spec
from wire.codecs.compositions import COMPOSITIONS
from wire.errors import MissingExtra, UserError
from wire.run_spec import RunSpec

EXAMPLES = """\
examples:
  edgetune demo
  edgetune demo --data reuters --clients 4 --rounds 2
  edgetune demo --data notes.jsonl --codec int4 --out mine

It writes report.json, loss.png and the tuned adapter to the --out folder, and beside them what every process said.
"""
FEDERATED = "federated"
MARK = ".edgetune-demo"
CLIENT_MEMORY = "1300M"
"""What each client may use: three of them, a coordinator and this process stay well below 6 GB."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    whats = f"{', '.join(SOURCES)}, or a file of JSON lines; default: %(default)s"
    parser.add_argument("--data", default="shakespeare", metavar="TEXT", help=whats)
    parser.add_argument("--clients", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=4, metavar="N", help="default: %(default)s")
    parser.add_argument("--local-steps", type=int, default=8, metavar="N", help="a round; default: %(default)s")
    parser.add_argument("--codec", default="top_k_int4", choices=sorted(COMPOSITIONS), help="default: %(default)s")
    parser.add_argument("--model", default="smollm2-135m", metavar="MODEL", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, metavar="S", help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("demo-out"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="the report on standard output")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    from edgetune.demo.report import lines, table

    _check_installed()
    console = Console(stderr=True)
    if not 1 <= args.clients <= 64:
        raise UserError("--clients must lie between 1 and 64")
    spec = _spec(args)
    names = _prepare(args)
    _base(args.model, console)
    started = time.monotonic()
    with Processes(args.out) as processes:
        address = processes.coordinator()
        measured = _federate(spec, names, address, processes, args.out, console)
        console.print("measuring every model on the text of all clients", highlight=False)
        report = _compare(spec, names, address, args, measured, started, processes)
    report.write(args.out)
    console.print(table(report))
    for line in lines(report):
        console.print(line, highlight=False)
    console.print(f"written to {args.out}: report.json, loss.png, adapter/", highlight=False)
    if args.json:
        print(json.dumps(dataclasses.asdict(report)))
    return 0


def _check_installed() -> None:
    """Before anything starts: the demo needs a client, a coordinator and pictures."""
    for name in ("torch", "transformers", "peft", "psutil", "gguf", "matplotlib"):
        if importlib.util.find_spec(name) is None:
            raise MissingExtra(name, "demo")


def _spec(args: argparse.Namespace) -> RunSpec:
    return run_spec.parse(
        {
            "name": FEDERATED,
            "base": {"model": args.model, "format": "nf4"},
            "rounds": args.rounds,
            "cohort": {"goal": args.clients, "minimum": args.clients},
            "method": {
                "id": "lora", "rank": 8, "alpha": 16.0, "local_steps": args.local_steps, "batch": 4,
                "sequence_length": 128, "learning_rate": 1e-3,
            },
            "codec": args.codec,
            "evaluation": {"fraction": 0.1, "max_sequences": 8},
            "seed": args.seed,
        }
    )  # fmt: skip


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


def _base(model: str, console: Any) -> None:
    import quantize

    with console.status(f"preparing {model} (downloaded and quantized once, then kept)"):
        quantize.cached_base(model, "nf4")


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the federated part of the demo cost."""

    submitted: list[Event]
    seconds: float


def _federate(spec: RunSpec, names: list[str], address: str, processes: Processes, out: Path, console: Any) -> Measured:
    """Start the runs and the clients, and look on until all have ended."""
    from edge_client.transport import Connection
    from edgetune import runs

    alone = [
        dataclasses.replace(
            spec, name=f"alone-{i}", cohort=run_spec.Cohort(goal=1), codec=run_spec.parse_codec("float32")
        )
        for i in range(len(names))
    ]
    with Connection(address) as connection:
        for each in (spec, *alone):
            runs.create(connection, each)
    started = time.monotonic()
    more = ["--threads", "1", "--max-memory", CLIENT_MEMORY]
    for i, name in enumerate(names):
        processes.client(name, address, [FEDERATED, f"alone-{i}"], out / "data" / f"{name}.jsonl", more)
    submitted: list[Event] = []
    ended = started
    with _screen(spec, names, console) as show:
        for event in processes.until_ended(names):
            show(event)
            if event["event"] == "submitted" and event["run"] == FEDERATED:
                submitted.append(event)
                ended = time.monotonic()
    return Measured(submitted, ended - started)


def _screen(spec: RunSpec, names: list[str], console: Any) -> Any:
    from edgetune.demo.screen import Screen

    steps = spec.rounds * spec.method["local_steps"]
    return Screen(names, 2 * steps, FEDERATED, console)


def _compare(
    spec: RunSpec,
    names: list[str],
    address: str,
    args: argparse.Namespace,
    measured: Measured,
    started: float,
    processes: Processes,
) -> Any:
    """Every adapter on the held-out text of all clients together, by one engine."""
    from edge_client import bases, data, export
    from edge_client.engines.torch_engine import TorchEngine
    from edge_client.methods.lora import Lora
    from edge_client.transport import Connection
    from edgetune.demo.report import Report
    from quantize import QuantizedBase
    from wire import spec as plain_spec

    base = bases.find(spec.base)
    method: Lora = plain_spec.build({"lora": "edge_client.methods.lora:Lora"}, spec.method, "method")
    layout = method.layout(base)
    assert isinstance(base, QuantizedBase), "the demo tunes a language model"
    engine = TorchEngine.load(base, method.adapter(base), layout, threads=2)
    held_out = []
    for name in names:
        _, kept = data.split(data.read(args.out / "data" / f"{name}.jsonl"), spec.evaluation.fraction, spec.seed)
        held_out += engine.tokenize(kept, method.sequence_length)[: spec.evaluation.max_sequences]

    def loss(adapter: Any) -> float:
        engine.write(adapter)
        total, tokens = engine.loss(held_out)
        return total / tokens

    with Connection(address) as connection:
        status = connection.status(FEDERATED)
        federated = connection.release(FEDERATED, layout.size)[1]
        alone = [connection.release(f"alone-{i}", layout.size)[1] for i in range(len(names))]
    losses = [loss(adapter) for adapter in (method.initial(layout, spec.seed), *alone, federated)]
    export.to_peft(base, method.adapter(base), layout, federated, args.out / "adapter")
    trained = [event for event in measured.submitted if event["kind"] == "train"]
    return Report(
        clients=names,
        base_loss=losses[0],
        local_losses=losses[1:-1],
        federated_loss=losses[-1],
        rounds=spec.rounds,
        local_steps=spec.method["local_steps"],
        bytes_up_per_client_round=sum(e["bytes_up"] for e in trained) / len(trained),
        bytes_down_per_client_round=sum(e["bytes_down"] for e in trained) / len(trained),
        float32_bytes=4 * layout.size,
        wire_bytes_up=sum(max(e["wire_up"] for e in measured.submitted if e["client"] == name) for name in names),
        seconds=round(time.monotonic() - started, 1),
        seconds_federated=round(measured.seconds, 1),
        peak_rss_mb=processes.peak_rss_bytes >> 20,
        release_digests=[release.digest for release in status.releases],
        held_out_by_release=[release.held_out_loss for release in status.releases],
        held_out_tokens=sum(sequence.targets for sequence in held_out),
        codec=args.codec,
        model=args.model,
        seed=args.seed,
    )
