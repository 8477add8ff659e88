"""`edgetune experiment benchmark`: the survey's methods beside each other, on quality, bytes, memory, compute and fairness."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path

from edge_client import bases
from edge_client.engines import ENGINES
from experiments import benchmark_report, cells, corpora, domains, figures, pages, partitions, pool, survey
from experiments.benchmark_cell import Named
from experiments.cells import Cell
from experiments.rows import ROWS
from wire.errors import MachineError, UserError
from wire.spec import Plain

EXAMPLES = f"""\
examples:
  edgetune experiment benchmark --preset tiny                             a byte model, seconds
  edgetune experiment benchmark --preset small --jobs 2 --out study       SmolLM2-135M; hours; goes on where it was
  edgetune experiment benchmark --methods fedit ffa_lora mezo --domains news --partitions natural dirichlet-0.1 sizes-0.5
  edgetune experiment benchmark --methods fedit --codecs float32 int8 rotated_ecsq --domains speeches
  edgetune experiment benchmark --methods mezo --engines onnx torch --domains news
  edgetune experiment benchmark --data DIR --domains medicine law --general general
  edgetune experiment benchmark --preset small --domains news --answers 32     32 held-out questions answered by generation

methods: {", ".join(survey.SURVEY)}
to compare with, always there: {", ".join(survey.BASELINES)}
codecs: {", ".join(ROWS)}; each says both ways, up and down, in place of what the
method says; without --codecs all travels as the method says, or as float32
domains: {", ".join(corpora.CORPORA)}, and NAME of NAME.train.jsonl and NAME.test.jsonl (or .gz) in --data
partitions: natural (by the key "client"), even, dirichlet-ALPHA (of keys over devices), sizes-ALPHA (unequal amounts)

Every cell (a method, a domain dealt one way, a seed) is a federation in a process and a folder of its own, with real payloads and
the coordinator's own arithmetic. What is finished in --out is not done again, whatever had ended the program. It writes
report.html (which needs nothing beside it), report.json, report.csv and pictures.
"""


@dataclasses.dataclass(frozen=True)
class Preset:
    """`gradients` and `losses` are schedules of first-order and of zeroth-order methods. Sequences: `train` and `own` a device,
    `held_out` of a domain; `answers`: held-out questions that are answered by generation. `length` in tokens. `general`: domains
    whose held-out text tells what is forgotten. The rate that most methods share is times `faster`; a method with
    a rate of its own keeps it."""

    model: str
    format: str
    methods: tuple[str, ...]
    domains: tuple[str, ...]
    partitions: tuple[str, ...]
    general: tuple[str, ...]
    gradients: Plain
    losses: Plain
    devices: int = 4
    rounds: int = 5
    points: int = 5
    length: int = 64
    train: int = 48
    own: int = 4
    held_out: int = 16
    questions: int = 16
    answers: int = 0
    faster: float = 1.0
    max_memory: int | None = None


PRESETS: Mapping[str, Preset] = {
    "tiny": Preset(
        "toy", "toy", ("fedit", "ffa_lora", "rolora", "lora_fair", "diloco", "sparseloco"), ("speeches",), ("natural",), (),
        {"local_steps": 4, "batch": 4}, {"local_steps": 8, "batch": 4}, faster=20.0,
    ),
    "small": Preset(
        "smollm2-135m", "int4-onnx", tuple(survey.SURVEY), ("news", "speeches"), ("natural",), ("chat",),
        {"local_steps": 2, "batch": 4}, {"local_steps": 8, "batch": 4},
        rounds=4, points=4, length=48, train=24, own=2, held_out=12, questions=0, max_memory=900 << 20,
    ),
}  # fmt: skip
NUMBERS = ("rounds", "devices", "length", "train", "own", "held_out", "questions", "answers")
MAY_BE_NONE = ("questions", "answers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("benchmark-out"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny", help="default: %(default)s")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="default: by the preset")
    parser.add_argument("--domains", nargs="+", metavar="NAME", help="default: by the preset, or all of --data")
    parser.add_argument("--partitions", nargs="+", metavar="HOW", help="default: by the preset")
    parser.add_argument(
        "--codecs", nargs="+", metavar="CODEC", help="how updates and releases travel, instead of as the method says"
    )
    parser.add_argument("--engines", nargs="+", metavar="ENGINE", help="default: onnx for losses alone, else torch")
    parser.add_argument("--data", type=Path, metavar="DIR", help="a folder of domains")
    parser.add_argument(
        "--general", nargs="*", metavar="NAME", help="domains that are measured and not learned; default: by the preset"
    )
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="default: %(default)s")
    for name in NUMBERS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, metavar="N", help="default: by the preset")
    parser.add_argument("--model", metavar="MODEL", help="default: by the preset")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at once; default: %(default)s")
    parser.add_argument(
        "--target",
        type=figures.share,
        default=0.8,
        metavar="SHARE",
        help="of the pooled gain in loss; default: %(default)s",
    )
    parser.add_argument("--json", action="store_true", help="the report on standard output")


def run(args: argparse.Namespace) -> int:
    from rich.console import Console

    settings, wanted = _settings(args), _wanted(args)
    console = Console(stderr=True)
    texts = corpora.digests([*_domains(args), *settings["general"]], args.data)
    with cells.opened(args.out, settings, texts) as out:
        failed = pool.play("experiments.benchmark_cell", out, cells.by_row(wanted), args.jobs, console)
        found = cells.finished(out, wanted)
        if not found:
            raise MachineError(failed[0])
        report = benchmark_report.made(settings, found, args.target)
        benchmark_report.write(report, out)
    shown = map(benchmark_report.shown, report["lines"])
    pages.told(report, shown, f"written to {out}: report.html, report.json, report.csv, pictures", console, args.json)
    return pool.ended(failed, console)


def _settings(args: argparse.Namespace) -> Plain:
    """What all cells of a folder have in common. Raises UserError."""
    preset = PRESETS[args.preset]
    common = dataclasses.asdict(preset) | {name: n for name in NUMBERS if (n := getattr(args, name)) is not None}
    for name in (*NUMBERS, "seeds", "jobs"):
        least = 0 if name in MAY_BE_NONE else 1
        if (common | vars(args) if name in ("seeds", "jobs") else common)[name] < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}")
    for axis in ("methods", "domains", "partitions"):
        del common[axis]
    general = list(dict.fromkeys(preset.general if args.general is None else args.general))
    data = None if args.data is None else str(args.data.resolve())
    return common | {"general": general, "data": data, "model": args.model or preset.model}


def _check(args: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together, or mean nothing."""
    _check_engines(args.engines or (), args.model or PRESETS[args.preset].model)
    _check_general(args.general or (), _domains(args), args.data)


def _check_engines(engines: Sequence[str], model: str) -> None:
    able = [bases.TOY] if model == bases.TOY else [name for name in ENGINES if name not in (bases.TOY, "split")]
    for engine in engines:
        if engine not in able:
            raise UserError(f"--engines: {engine} cannot play --model {model} alone; choose of {', '.join(able)}")


def _check_general(general: Sequence[str], learned: Sequence[str], folder: Path | None) -> None:
    for domain in learned:
        if set(general) == {domain}:
            raise UserError(
                f"--general: {domain!r} is learned itself, and nothing else tells what is forgotten; name another"
            )
    for name in general:
        if folder is not None and not corpora.built_in(name, folder) and not domains.held_out(folder, name):
            raise UserError(f"--general: {name!r} has no held-out text in {folder}")


def _wanted(args: argparse.Namespace) -> list[Cell]:
    """Every cell: the baselines of a place first, then each method with each codec on each engine. Raises UserError."""
    preset = PRESETS[args.preset]
    methods = cells.checked(args.methods or list(preset.methods), survey.SURVEY, "--methods")
    codecs = cells.checked(args.codecs, ROWS, "--codecs") if args.codecs else [None]
    engines = cells.checked(args.engines, ENGINES, "--engines") if args.engines else [None]
    rows = [str(Named(method, codec, engine)) for method in methods for codec in codecs for engine in engines]
    known = {*corpora.CORPORA, *(domains.names(args.data) if args.data else ())}
    places = [
        f"{domain}/{partitions.checked(how)}"
        for domain in cells.checked(_domains(args), dict.fromkeys(sorted(known)), "--domains")
        for how in args.partitions or preset.partitions
    ]
    cells.checked(_settings(args)["general"], dict.fromkeys(sorted(known)), "--general")
    _check(args)
    return cells.grid([*survey.BASELINES, *rows], places, args.seeds)


def _domains(args: argparse.Namespace) -> list[str]:
    return list(args.domains or (domains.names(args.data) if args.data else PRESETS[args.preset].domains))
