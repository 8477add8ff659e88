"""What losses alone can learn, and what it costs: every method on one task, by forwards, seconds, bytes and memory.

    python -m experiments.zeroth_order r8 --out DIR
    python -m experiments.zeroth_order r8 --rows "mezo core" lora --seeds 3 --forwards 3600 --out DIR

A federation of four devices among which the topics are spread unevenly. Each row and seed is a process of its own, whose
curve is a file in DIR: what is there is not done again. DIR/curves.png draws them, DIR/table.md sums them up.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from edge_client import bases
from edge_client.data import Example, Message
from edge_client.engines import ENGINES, Tokens
from edge_client.engines.onnx_engine import OnnxEngine
from edge_client.methods import METHODS, Method
from edge_client.participate import peak_rss_bytes
from experiments import measures
from experiments.simulation import Simulation, Spent, spec_of
from experiments.tasks import TASKS, Task
from wire import run_spec, spec
from wire.delta import Vector
from wire.run_spec import BaseRef
from wire.spec import Plain

LENGTH = 64
"""Tokens a sequence, prompt and answer; longer questions are cut."""
CORE: Plain = {"id": "lora_sb", "rank": 8, "layers": 6}
ZO: Plain = {"batch": 8, "sequence_length": LENGTH, "local_steps": 15, "epsilon": 5e-3, "learning_rate": 3e-2}
FO: Plain = {"batch": 8, "sequence_length": LENGTH, "local_steps": 5}
HYBRID: Plain = {"id": "hybrid", "rank": 8, "learning_rate": 1e-3, "learning_rate_below": 1e-4} | FO
ROWS: dict[str, Plain] = {
    "lora": {"id": "lora", "rank": 8, "learning_rate": 1e-3} | FO,
    "core by gradients": {"id": "lora", "adapter": CORE, "learning_rate": 1e-2} | FO,
    "mezo core": {"id": "mezo", "adapter": CORE} | ZO,
    "mezo norms": {"id": "mezo", "adapter": {"id": "norms", "layers": 6}} | ZO,
    "decomfl core": {"id": "decomfl", "adapter": CORE} | ZO,
    "hiso core": {"id": "hiso", "adapter": CORE} | ZO,
    "kseed core": {"id": "kseed", "adapter": CORE, "pool": 1024} | ZO,
    "mezo lora-B": (
        {"id": "mezo", "adapter": {"id": "lora", "rank": 8, "tuned": "B", "targets": ["q_proj", "v_proj"], "layers": 6}}
        | ZO | {"learning_rate": 3e-3, "epsilon": 2e-3}
    ),
    "mezo subzero": {"id": "mezo", "adapter": CORE, "subspace": {"structure": "subzero", "rank": 4, "refresh": 2}} | ZO,
    "mezo lozo": {"id": "mezo", "adapter": CORE, "subspace": {"structure": "lozo", "rank": 2, "refresh": 2}} | ZO,
    "fwdllm core": {"id": "fwdllm", "adapter": CORE} | ZO,
    "hybrid 8": HYBRID | {"layers": 8},
    "hybrid 12": HYBRID | {"layers": 12},
    "lora in 8 layers": {"id": "lora", "adapter": {"id": "lora", "rank": 8, "layers": 8}, "learning_rate": 1e-3} | FO,
    "hybrid core": {
        "id": "hybrid", "adapter": {"id": "lora_sb", "rank": 8}, "layers": 8, "learning_rate": 1e-2,
        "learning_rate_below": 1e-2,
    } | FO,
    "ferret core": {"id": "ferret", "adapter": CORE, "projections": 256, "learning_rate": 1e-2} | FO,
}  # fmt: skip
"""Name -> a row of METHODS."""
FO_ROUNDS = 6
MEMORY = 900 << 20
"""What an engine may use: enough to keep the hidden states below what is tuned."""


@dataclasses.dataclass(frozen=True)
class Point:
    """Where a curve stands after `rounds`; costs since its start over all devices, loss in nats a target, accuracy 0 to 1."""

    rounds: int
    forwards: int
    seconds: float
    bytes_up: int
    loss: float
    accuracy: float


@dataclasses.dataclass(frozen=True)
class Cell:
    """One row, one seed. `peak_memory` of the whole process, in bytes."""

    row: str
    seed: int
    parameters: int
    peak_memory: int
    points: tuple[Point, ...]


def main() -> None:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.cell is not None:
        row, seed = args.cell
        _write(_place(args.out, row, int(seed)), measured(args, row, int(seed)))
        return
    wanted = [(row, seed) for seed in range(args.seeds) for row in args.rows]
    todo = [cell for cell in wanted if not _place(args.out, *cell).exists()]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda cell: _process(*cell), todo))
    cells = [_read(path) for path in sorted(args.out.glob("*.cell.json"))]
    (args.out / "table.md").write_text(table(cells))
    print(table(cells))
    picture(cells, args.out / "curves.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", nargs="+", choices=sorted(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--devices", type=int, default=4)
    parser.add_argument(
        "--forwards", type=int, default=1200, help="forwards of the zeroth-order rows, over all devices"
    )
    parser.add_argument("--train", type=int, default=320, help="training examples, over all devices")
    parser.add_argument("--held-out", type=int, default=64, help="test examples measured")
    parser.add_argument("--points", type=int, default=2, help="measurements of a curve after its start")
    parser.add_argument("--set", type=json.loads, default={}, metavar="JSON", help="changes to the rows' tables")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="rows at once, a process each")
    parser.add_argument("--cell", nargs=2, metavar=("ROW", "SEED"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path("zeroth-order"))
    return parser.parse_args()


def _process(row: str, seed: int) -> None:
    subprocess.run(
        [sys.executable, "-m", "experiments.zeroth_order", *sys.argv[1:], "--cell", row, str(seed)], check=True
    )


def measured(args: argparse.Namespace, row: str, seed: int) -> Cell:
    """One row from the base on, measured at a few points."""
    table = ROWS[row] | args.set
    method: Method = spec.build(METHODS, table)
    task = TASKS[args.task](args.devices, args.train, args.held_out, seed)
    rounds = FO_ROUNDS if not method.forward_only else max(1, args.forwards // (2 * method.local_steps * args.devices))
    base = BaseRef(args.model, "int4-onnx")
    run = run_spec.parse(spec_of("experiment", table, rounds, len(task.devices), spec.plain(base), seed))
    chosen: Any = spec.row_class(ENGINES, "onnx" if method.forward_only else "torch")
    memory = MEMORY if method.forward_only else None
    simulation = Simulation(run, bases.find(base), chosen, args.threads, memory)
    devices = {name: _tokens(simulation.engine, some, task.question) for name, some in task.devices.items()}
    reached, spent = [(simulation.adapter, 0, Spent())], Spent()
    for number in range(1, rounds + 1):
        spent += simulation.round(devices)
        print(f"{row}, seed {seed}: round {number} of {rounds}, {spent}", file=sys.stderr, flush=True)
        if number == rounds or number % max(1, rounds // args.points) == 0:
            reached.append((simulation.adapter, number, spent))
    peak, parameters = peak_rss_bytes(), simulation.layout.size
    test = Measure(_judge(simulation, args.threads), task)
    points = tuple(test.point(*where) for where in reached)
    return Cell(row, seed, parameters, peak, points)


def _judge(simulation: Simulation, threads: int) -> Any:
    """The engine that measures: onnx for every row, after training and its peak of memory."""
    if not simulation.engine.gradients:
        return simulation.engine
    base, layout = bases.find(simulation.run.base), simulation.layout
    return OnnxEngine.load(base, simulation.adapter_row, layout, MEMORY, threads=threads)


class Measure:
    """Held-out loss, and accuracy by the likeliest of a task's answers."""

    def __init__(self, engine: Any, task: Task) -> None:
        self._engine, self._right = engine, [e.messages[1].content for e in task.test if e.messages]
        self._labels = task.labels
        self._plain = _tokens(engine, task.test, task.question) if not task.labels else []
        self._answers = [
            _tokens(engine, [_answered(example, label) for label in task.labels], task.question)
            for example in task.test
            if task.labels
        ]

    def point(self, adapter: Vector, rounds: int, spent: Spent) -> Point:
        self._engine.write(adapter)
        loss, accuracy = (
            self._chosen() if self._labels else (measures.mean_loss(self._engine, self._plain), float("nan"))
        )
        return Point(
            rounds, spent.forwards, round(spent.seconds, 1), spent.bytes_up, round(loss, 4), round(accuracy, 4)
        )

    def _chosen(self) -> tuple[float, float]:
        """The mean loss of the right answers in nats a target, and how often they are the likeliest as a whole."""
        mine = [self._labels.index(right) for right in self._right]
        sums = measures.chosen(self._engine, self._answers)
        targets = sum(answers[i].targets for answers, i in zip(self._answers, mine, strict=True))
        total = sum(float(found[i]) for found, i in zip(sums, mine, strict=True))
        right = [int(np.argmin(found)) == i for found, i in zip(sums, mine, strict=True)]
        return total / targets, float(np.mean(right))


def _answered(example: Example, label: str) -> Example:
    return Example(messages=(example.messages[0], Message("assistant", label)))


def _tokens(engine: Any, examples: Sequence[Example], question: str) -> list[Tokens]:
    """Tokenized, with questions cut so that the answer fits."""
    short = [measures.shortened(engine, example, LENGTH, f"\n{question}") for example in examples]
    sequences: list[Tokens] = engine.tokenize(short, LENGTH)
    return sequences


def _place(folder: Path, row: str, seed: int) -> Path:
    return folder / f"{row.replace(' ', '-')}-{seed}.cell.json"


def _write(path: Path, cell: Cell) -> None:
    aside = path.with_suffix(".aside")
    aside.write_text(json.dumps(dataclasses.asdict(cell), indent=1))
    aside.replace(path)


def _read(path: Path) -> Cell:
    table = json.loads(path.read_text())
    return Cell(**table | {"points": tuple(Point(**point) for point in table["points"])})


def table(cells: Sequence[Cell]) -> str:
    """The end of each curve, as Markdown; mean and spread over seeds."""
    head = ["row", "parameters", "forwards", "loss", "accuracy", "bytes up", "processor s", "peak MB"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for row, some in _by_row(cells).items():
        ends = [cell.points[-1] for cell in some]
        said = [row, f"{some[0].parameters:,}", f"{ends[0].forwards:,}", _spread([p.loss for p in ends], 3)]
        said += [_spread([100 * p.accuracy for p in ends], 0) + " %", f"{np.mean([p.bytes_up for p in ends]):,.0f}"]
        said += [f"{np.mean([p.seconds for p in ends]):,.0f}", f"{max(cell.peak_memory for cell in some) / 1e6:,.0f}"]
        lines.append("| " + " | ".join(said) + " |")
    return "\n".join(lines) + "\n"


def _by_row(cells: Sequence[Cell]) -> Mapping[str, list[Cell]]:
    return {row: [cell for cell in cells if cell.row == row] for row in dict.fromkeys(cell.row for cell in cells)}


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{np.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def picture(cells: Sequence[Cell], path: Path) -> None:
    """Loss against forwards, processor seconds and bytes; a line a row, the mean of its seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(14, 4.5), layout="constrained", sharey=True)
    names = {"forwards": "forwards", "seconds": "processor seconds", "bytes_up": "bytes up"}
    for side, (by, name) in zip(axes, names.items(), strict=True):
        for row, some in _by_row(cells).items():
            points = list(zip(*(cell.points for cell in some), strict=True))
            points = points[1:] if by == "bytes_up" else points  # the start has no bytes, and a log scale no zero
            across = [float(np.mean([getattr(p, by) for p in at])) for at in points]
            side.plot(across, [float(np.mean([p.loss for p in at])) for at in points], "o-", ms=3, label=row)
        side.set(xlabel=name, xscale="log" if by == "bytes_up" else "linear")
        side.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("held-out loss (nats a target)")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
