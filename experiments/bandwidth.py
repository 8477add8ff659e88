"""`edgetune experiment bandwidth`: what a codec saves on a slow link, by federations of real processes behind emulated links."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_client import bases
from edge_client.session import settled
from edge_client.transport import Connection
from experiments import bandwidth_report, cells, figures, pages
from experiments.cells import Cell
from experiments.link import Link, Rates
from experiments.parts import SOURCES, digests, parts
from experiments.processes import Event, Processes, end_orphans
from experiments.rows import ROWS
from wire import run_spec
from wire.errors import UserError
from wire.messages import ReleaseStatus, RunStatus
from wire.spec import Plain

EXAMPLES = f"""\
examples:
  edgetune experiment bandwidth                                           a byte model: three rows, three links, minutes
  edgetune experiment bandwidth --preset small --links 1/5                SmolLM2-135M behind a slow uplink
  edgetune experiment bandwidth --preset small --rows float32 rotated_ecsq --seeds 3 --rounds 8 --out study
  edgetune experiment bandwidth --links 1/5 --round-trip-ms 200 --cut-every-s 20
  edgetune experiment bandwidth --preset small --data notes.jsonl --model ./my-model

rows: {", ".join(ROWS)}

Every cell (a row, a link, a seed) starts a coordinator and clients, each client behind a link of its own: a proxy on loopback
with a token bucket up and down. Bytes are counted there, calls and framing included. What is finished in --out is not done again.
It writes report.html (which needs nothing beside it), report.json, report.csv, and the pictures bytes.png and time.png.
"""
RUN = "bandwidth"
MBIT = 1e6


@dataclasses.dataclass(frozen=True)
class Preset:
    """A federation: what is tuned, and how long."""

    model: str
    format: str
    method: Plain
    rounds: int
    client: tuple[str, ...]


PRESETS: Mapping[str, Preset] = {
    "quick": Preset(
        "toy", "toy",
        {"id": "lora", "rank": 128, "local_steps": 16, "batch": 8, "sequence_length": 64, "learning_rate": 3e-3},
        6, ("--engine", "toy"),
    ),
    "small": Preset(
        "smollm2-135m", "nf4",
        {
            "id": "lora", "rank": 8, "alpha": 16.0, "local_steps": 8, "batch": 4, "sequence_length": 128,
            "learning_rate": 1e-3,
        },
        4, ("--threads", "1", "--max-memory", "1300M"),
    ),
}  # fmt: skip
Tell = Callable[[str], None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("bandwidth-out"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="quick", help="default: %(default)s")
    parser.add_argument("--links", nargs="+", default=["1/5", "10/50", "100/100"], metavar="UP/DOWN", help="in Mbit/s")
    parser.add_argument("--rows", nargs="+", default=["float32", "int4", "rotated_ecsq"], metavar="ROW")
    parser.add_argument("--rounds", type=int, metavar="N", help="default: by the preset")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--clients", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--model", metavar="MODEL", help="default: by the preset")
    whats = f"{', '.join(SOURCES)}, or a file of JSON lines; default: %(default)s"
    parser.add_argument("--data", default="shakespeare", metavar="TEXT", help=whats)
    parser.add_argument(
        "--round-trip-ms", type=figures.not_negative, default=40.0, metavar="MS", help="default: %(default)s"
    )
    parser.add_argument(
        "--cut-every-s", type=figures.not_negative, default=0.0, metavar="S", help="mean; default: never"
    )
    parser.add_argument(
        "--target",
        type=figures.share,
        default=0.9,
        metavar="SHARE",
        help="of the first row's gain in loss; default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="the report on standard output")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    wanted = cells.grid(cells.checked(args.rows, ROWS, "--rows"), [_link(text) for text in args.links], args.seeds)
    settings, console = _settings(args), Console(stderr=True)
    with cells.opened(args.out, settings, digests(settings["data"])) as out:
        _play(out, wanted, settings, console)
        report = bandwidth_report.made(settings, cells.finished(out, wanted), args.target)
        bandwidth_report.write(report, out)
    shown = map(bandwidth_report.shown, report["lines"])
    pages.told(
        report,
        shown,
        f"written to {out}: report.html, report.json, report.csv, bytes.png, time.png",
        console,
        args.json,
    )
    return 0


def _play(out: Path, wanted: Sequence[Cell], settings: Plain, console: Any) -> None:
    """Each cell that is not done, one after the other."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    todo = [cell for cell in wanted if cells.done(out, cell) is None]
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("", total=len(wanted), completed=len(wanted) - len(todo))
        for cell in todo:
            _measure(out, cell, settings, lambda said: progress.update(bar, description=said))
            progress.advance(bar)


def _link(text: str) -> str:
    """UP/DOWN, checked. Raises UserError."""
    with contextlib.suppress(ValueError):
        up, down = map(float, text.split("/"))
        Rates(up, down)
        return text
    raise UserError(f"--links {text!r}: expected rates up and down in Mbit/s, like 1/5")


def _settings(args: argparse.Namespace) -> Plain:
    """What all cells of a folder have in common."""
    preset = PRESETS[args.preset]
    rounds = preset.rounds if args.rounds is None else args.rounds
    for name, value in (("--rounds", rounds), ("--seeds", args.seeds), ("--clients", args.clients)):
        if value < 1:
            raise UserError(f"{name} must be at least 1")
    data = args.data if args.data in SOURCES else str(Path(args.data).resolve())
    return {
        "preset": args.preset, "model": args.model or preset.model, "format": preset.format, "method": preset.method,
        "rounds": rounds, "clients": args.clients, "data": data, "round_trip_ms": args.round_trip_ms,
        "cut_every_s": args.cut_every_s,
    }  # fmt: skip


def _measure(out: Path, cell: Cell, settings: Plain, tell: Tell) -> None:
    end_orphans(cells.folder(out, cell))
    folder = cells.begun(out, cell)
    texts, data = digests(settings["data"]), _dealt(settings, folder)
    with Processes(folder) as processes, contextlib.ExitStack() as opened:
        address = processes.coordinator()
        parameters = _create(address, cell, settings)
        links = {
            name: opened.enter_context(Link(address, _rates(cell, settings), 1000 * cell.seed + i))
            for i, name in enumerate(data)
        }
        for name, path in data.items():
            processes.client(name, links[name].address, [RUN], path, list(PRESETS[settings["preset"]].client))
        watched = Watched(links)
        for event in processes.until_ended(list(data)):
            watched.saw(event)
            tell(f"{cell.row} at {cell.place} Mbit/s, seed {cell.seed}: {watched.round} of {settings['rounds']} rounds")
        with Connection(address) as connection:
            status = connection.status(RUN)
    cells.finish(out, cell, {"parameters": parameters, cells.TEXTS: texts} | watched.found(status))


def _rates(cell: Cell, settings: Plain) -> Rates:
    up, down = map(float, cell.place.split("/"))
    return Rates(up * MBIT, down * MBIT, settings["round_trip_ms"] / 1000, settings["cut_every_s"])


def _dealt(settings: Plain, folder: Path) -> dict[str, Path]:
    """A data file for each client."""
    written = {}
    for name, lines in parts(settings["data"], settings["clients"]).items():
        written[name] = folder / f"{name}.jsonl"
        written[name].write_text("\n".join(lines) + "\n", encoding="utf-8")
    return written


def _create(address: str, cell: Cell, settings: Plain) -> int:
    """Open the run of a cell; how many parameters it tunes."""
    wanted = run_spec.parse(
        {
            "name": RUN, "base": {"model": settings["model"], "format": settings["format"]}, "rounds": settings["rounds"],
            "cohort": {"goal": settings["clients"], "minimum": settings["clients"]}, "method": settings["method"],
            "seed": cell.seed,
        } | ROWS[cell.row].spec
    )  # fmt: skip
    base = bases.find(wanted.base)
    settled_run, adapter = settled(
        dataclasses.replace(wanted, base=dataclasses.replace(wanted.base, digest=base.identity)), base
    )
    layout = adapter.layout(base)
    with Connection(address) as connection:
        connection.create_run(settled_run, layout, adapter.initial(layout, settled_run.seed, base))
    return layout.size


@dataclasses.dataclass(frozen=True)
class Total:
    """Over all clients since the start: bytes on their links, bytes of payloads and releases, seconds of training."""

    wire_up: int = 0
    wire_down: int = 0
    payload_up: int = 0
    payload_down: int = 0
    training_s: float = 0.0


class Watched:
    """What a federation costs as it goes. Its time starts with the first task: programs and base are there by then."""

    def __init__(self, links: Mapping[str, Link]) -> None:
        self._links, self._began, self._client_rounds = links, 0.0, 0
        self._after: dict[int, Total] = {0: Total()}
        self._now, self._trained_in = Total(), {0}

    @property
    def round(self) -> int:
        """The last that a device has trained in."""
        return max(self._trained_in)

    def saw(self, event: Event) -> None:
        if event["event"] == "task" and not self._began:
            self._began = time.time()
        if event["event"] == "submitted":
            self._client_rounds += 1
            self._now = self._with(event)
            self._after[event["round"]] = self._now
            self._trained_in |= {event["round"]} if event["kind"] == "train" else set()

    def _with(self, event: Event) -> Total:
        return Total(
            sum(link.bytes_up for link in self._links.values()),
            sum(link.bytes_down for link in self._links.values()),
            self._now.payload_up + event["bytes_up"],
            self._now.payload_down + event["bytes_down"],
            self._now.training_s + event["seconds"],
        )

    def found(self, status: RunStatus) -> Plain:
        """Curves by release: the loss is what the clients measured of it, the costs are those until it was published."""
        overhead = self._now.wire_up + self._now.wire_down - self._now.payload_up - self._now.payload_down
        return {
            "releases": [self._release(release) for release in status.releases],
            "total": dataclasses.asdict(self._now), "client_rounds": self._client_rounds,
            "overhead_bytes": overhead / max(1, self._client_rounds), "refused": status.refused,
            "cuts": sum(link.cuts for link in self._links.values()),
        }  # fmt: skip

    def _release(self, release: ReleaseStatus) -> Plain:
        since = max(0.0, release.published_at - self._began) if release.version else 0.0
        spent = dataclasses.asdict(self._after[release.version])
        return {"version": release.version, "loss": release.held_out_loss, "seconds": round(since, 3)} | spent
