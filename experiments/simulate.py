"""`edgetune experiment simulate`: one federation of many virtual devices, in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

from experiments import benchmark, cells, corpora, domains, partitions, survey, workers
from experiments.cells import Cell
from experiments.simulation import Spent
from experiments.workers import Spread
from wire.errors import UserError
from wire.spec import Plain

EXAMPLES = """\
examples:
  edgetune experiment simulate --clients 100                              a byte model, everything in this process
  edgetune experiment simulate --clients 1000 --engine processes --workers 2
  edgetune experiment simulate --clients 1000 --engine ray --workers 2    a Ray cluster of this machine
  edgetune experiment simulate --clients 1000 --engine ray --workers 64 --address auto
  edgetune experiment simulate --preset small --clients 16 --rounds 2 --engine processes --workers 2

A worker has one base in memory for all of its devices. Wherever devices train, the releases are the same, bit for bit; their
digests are printed. On a cluster of several machines each needs edgetune, and the text or --data at the same place. Ray
carries objects between its processes in a form that runs code when it is read: give it a network of its own.
"""
ENGINES = ("here", "processes", "ray")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=sorted(benchmark.PRESETS), default="tiny", help="default: %(default)s")
    parser.add_argument("--method", default="fedit", metavar="METHOD", help="of the benchmark; default: %(default)s")
    parser.add_argument("--domain", default="chat", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--partition", default="natural", metavar="HOW", help="default: %(default)s")
    parser.add_argument("--data", type=Path, metavar="DIR", help="a folder of domains")
    parser.add_argument("--clients", type=int, default=100, metavar="N", help="virtual devices; default: %(default)s")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    parser.add_argument("--engine", choices=ENGINES, default="here", help="where devices train; default: %(default)s")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--address", metavar="ADDRESS", help="of a Ray cluster that runs; default: one for this command"
    )
    parser.add_argument("--json", action="store_true", help="one object on standard output")


def run(args: argparse.Namespace) -> int:
    cell, settings = _cell(args), _settings(args)
    began = time.monotonic()
    if args.engine == "here":
        found = _played(Spread(cell, settings, []), args, began)
    else:
        with workers.hands(args.engine, args.address, args.workers, cell, settings) as hands:
            found = _played(Spread(cell, settings, hands), args, began)
    if args.json:
        print(json.dumps(found))
    return 0


def _played(spread: Spread, args: argparse.Namespace, began: float) -> Plain:
    rounds = []
    for number in range(1, args.rounds + 1):
        spent = spread.round() if args.engine != "here" else spread.federation.round()
        rounds.append(_round(number, spread.federation.simulation.release.digest, spent, time.monotonic() - began))
        if not args.json:
            print(_said(rounds[-1]), flush=True)
    return {"clients": len(spread.devices), "engine": args.engine, "workers": args.workers, "rounds": rounds}


def _round(number: int, digest: str, spent: Spent, seconds: float) -> Plain:
    return {"round": number, "release": digest, "elapsed_s": round(seconds, 2)} | dataclasses.asdict(spent)


def _said(found: Plain) -> str:
    return (
        f"round {found['round']}: release {found['release']}  {found['bytes_up'] / 1e6:.3f} MB up"
        f"  {found['seconds']:.1f} processor s  {found['elapsed_s']:.1f} s since the start"
    )


def _cell(args: argparse.Namespace) -> Cell:
    """Raises UserError for what there is not."""
    cells.checked([args.method], survey.SURVEY, "--method")
    if survey.SURVEY[args.method].first is not None:
        raise UserError(
            f"--method {args.method} is two runs, one after the other: `edgetune experiment benchmark` plays it"
        )
    known = [*corpora.CORPORA, *(domains.names(args.data) if args.data else ())]
    cells.checked([args.domain], dict.fromkeys(known), "--domain")
    for name in ("clients", "rounds", "workers"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} must be at least 1")
    if not 0 <= args.seed < 1 << 63:
        raise UserError("--seed must lie between 0 and 2^63 - 1")
    if args.address is not None and args.engine != "ray":
        raise UserError("--address is of a Ray cluster: give --engine ray with it, or leave it out")
    return Cell(args.method, f"{args.domain}/{partitions.checked(args.partition, '--partition')}", args.seed)


def _settings(args: argparse.Namespace) -> Plain:
    preset = dataclasses.asdict(benchmark.PRESETS[args.preset])
    data = None if args.data is None else str(args.data.resolve())
    return preset | {"data": data, "devices": args.clients, "rounds": args.rounds}
