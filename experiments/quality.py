"""`edgetune experiment quality`: what coded updates and releases leave of float32's improvement; one process a cell."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_client import bases
from edge_client.data import Example
from edge_client.engines import ENGINES, Tokens
from experiments import cells, domains, figures, pages, pool, quality_report
from experiments.cells import Cell
from experiments.pool import Tell
from experiments.rows import ROWS
from experiments.simulation import Simulation, Spent, spec_of
from wire import run_spec, spec
from wire.delta import Vector
from wire.errors import MachineError, PayloadError, UserError
from wire.run_spec import BaseRef
from wire.spec import Plain

EXAMPLES = f"""\
examples:
  edgetune experiment quality --data domains --domains medicine law --out study
  edgetune experiment quality --data domains --rows float32 rotated_ecsq --seeds 3 --out study
  edgetune experiment quality --data domains --rows float32 int4 --rounds 20 --clients 8 --jobs 2

rows: {", ".join(ROWS)}

--data is a folder of NAME.train.jsonl and NAME.test.jsonl, or .jsonl.gz; lines with a key "client" stay together on one device.
Every cell (a row, a domain, a seed) is a federation in a process of its own, with real payloads and the coordinator's own
arithmetic. What is finished in --out is not done again. It writes report.md, report.json, report.csv and quality.png.
"""
METHOD: Plain = {"id": "lora", "rank": 8, "alpha": 16.0}
POINTS = 3
"""Measurements of a federation: the base, half way, the end."""
EXAMPLES_READ = 4
"""Examples that are tokenized for one that is wanted: those whose answer lies beyond the length are left out."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="a folder of domains")
    parser.add_argument("--out", type=Path, default=Path("quality-out"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--domains", nargs="+", metavar="NAME", help="default: all of the folder")
    rows = ["float32", "int4", "rotated_ecsq"]
    parser.add_argument("--rows", nargs="+", default=rows, metavar="ROW", help="the first is compared with")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=10, metavar="N", help="default: %(default)s")
    parser.add_argument("--clients", type=int, default=4, metavar="N", help="default: %(default)s")
    parser.add_argument("--local-steps", type=int, default=2, metavar="N", help="a round; default: %(default)s")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="default: %(default)s")
    parser.add_argument("--length", type=int, default=128, metavar="TOKENS", help="default: %(default)s")
    parser.add_argument(
        "--learning-rate", type=figures.positive, default=1e-3, metavar="X", help="default: %(default)s"
    )
    parser.add_argument("--train", type=int, default=64, metavar="N", help="sequences a device; default: %(default)s")
    parser.add_argument("--held-out", type=int, default=32, metavar="N", help="sequences; default: %(default)s")
    parser.add_argument("--model", default="smollm2-135m", metavar="MODEL", help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at once; default: %(default)s")
    parser.add_argument("--json", action="store_true", help="the report on standard output")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    _check(args)
    known = domains.names(args.data)
    places = cells.checked(args.domains or known, dict.fromkeys(known), "--domains")
    wanted = cells.grid(cells.checked(args.rows, ROWS, "--rows"), places, args.seeds)
    console = Console(stderr=True)
    with cells.opened(args.out, _settings(args), domains.digests(args.data, places)) as out:
        failed = pool.play("experiments.quality", out, wanted, args.jobs, console)
        found = cells.finished(out, wanted)
        if not found:
            raise MachineError(failed[0])
        report = quality_report.made(_settings(args), found, wanted[0].row)
        quality_report.write(report, out)
    written = f"written to {out}: report.md, report.json, report.csv, quality.png"
    pages.told(report, [quality_report.markdown(report)], written, console, args.json)
    return pool.ended(failed, console)


def _check(args: argparse.Namespace) -> None:
    for name in ("seeds", "rounds", "clients", "local_steps", "batch", "length", "train", "held_out", "jobs"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")


def _settings(args: argparse.Namespace) -> Plain:
    """What all cells of a folder have in common."""
    method = METHOD | {
        "local_steps": args.local_steps, "batch": args.batch, "sequence_length": args.length,
        "learning_rate": args.learning_rate,
    }  # fmt: skip
    return {
        "data": str(args.data.resolve()), "model": args.model, "method": method, "rounds": args.rounds,
        "clients": args.clients, "train": args.train, "held_out": args.held_out,
    }  # fmt: skip


def measured(cell: Cell, settings: Plain, tell: Tell) -> Plain:
    """A federation from the base to its last round, measured at a few points."""
    texts = domains.digests(Path(settings["data"]), [cell.place])
    played = Played(cell, settings)
    refused = None
    for number in range(1, settings["rounds"] + 1):
        tell(f"{cell.row}, {cell.place}, seed {cell.seed}: round {number} of {settings['rounds']}")
        try:
            played.round()
        except (
            PayloadError
        ) as error:  # what a coordinator would not have taken: the row ends here, and its report says so
            refused = f"round {number}: {error.reason.value}"
            break
    played.mark()
    found = {"parameters": played.parameters, "devices": settings["clients"], "refused": refused}
    return found | {"points": played.points(), cells.TEXTS: texts}


class Played:
    """One federation, the adapters that it reached, and what they cost."""

    def __init__(self, cell: Cell, settings: Plain) -> None:
        toy = settings["model"] == bases.TOY
        base = BaseRef(settings["model"], bases.TOY if toy else "nf4")
        table = spec_of(
            "quality", settings["method"], settings["rounds"], settings["clients"], spec.plain(base), cell.seed
        )
        engine: Any = spec.row_class(ENGINES, "toy" if toy else "torch")
        run = run_spec.parse(table | ROWS[cell.row].spec)
        self._simulation = Simulation(run, bases.find(base), engine, 1, None)
        folder, self._length = Path(settings["data"]), settings["method"]["sequence_length"]
        texts = domains.dealt(folder, cell.place, settings["clients"], cell.seed)
        self._devices = {name: self._tokens(some, settings["train"]) for name, some in texts.items()}
        self._test = self._tokens(domains.held_out(folder, cell.place), settings["held_out"])
        self._rounds, self._number, self._spent = settings["rounds"], 0, Spent()
        self._reached: list[tuple[int, Spent, Vector]] = [(0, self._spent, self._simulation.adapter)]

    @property
    def parameters(self) -> int:
        return self._simulation.layout.size

    def round(self) -> None:
        self._spent += self._simulation.round(self._devices)
        self._number += 1
        if self._number % max(1, self._rounds // (POINTS - 1)) == 0:
            self.mark()

    def mark(self) -> None:
        """This adapter will be measured, once."""
        if self._reached[-1][0] != self._number:
            self._reached.append((self._number, self._spent, self._simulation.adapter))

    def points(self) -> list[Plain]:
        return [
            {"round": number, "loss": self._loss(adapter)} | dataclasses.asdict(spent)
            for number, spent, adapter in self._reached
        ]

    def _loss(self, adapter: Vector) -> float:
        """Held-out loss in nats a token."""
        self._simulation.engine.write(adapter)
        total, targets = self._simulation.engine.loss(self._test)
        return float(total / targets)

    def _tokens(self, examples: Sequence[Example], wanted: int) -> list[Tokens]:
        """The first `wanted` sequences. Raises UserError where none has an answer within the length."""
        found: list[Tokens] = self._simulation.engine.tokenize(examples[: EXAMPLES_READ * wanted], self._length)[
            :wanted
        ]
        if not found:
            raise UserError(f"no example has an answer within {self._length} tokens; give a larger --length")
        return found


if __name__ == "__main__":
    pool.child(sys.argv[1:], measured)
