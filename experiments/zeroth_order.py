"""What losses alone can learn, and what it costs: every method on one task, by forwards, seconds and bytes.

    python -m experiments.zeroth_order TRAIN.jsonl TEST.jsonl --labels earn,acq,... --out DIR

One process, one device a method: local training is what differs between methods, and what this compares. Each row is a
curve in DIR/curves.json, finished rows are kept, so that an interrupted run goes on; DIR/curves.png draws them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edge_client import bases, data
from edge_client.adapters import Adapter
from edge_client.data import Example, Message
from edge_client.engines import ENGINES, Tokens
from edge_client.methods import METHODS, Draw, Method
from wire import spec
from wire.delta import Delta, Vector
from wire.run_spec import BaseRef
from wire.scalars import Directions, Scalars, Step, Trajectory
from wire.spec import Plain

CORE: Plain = {"id": "lora_sb", "rank": 8, "layers": 6}
ZO: Plain = {"batch": 8, "sequence_length": 64, "local_steps": 30, "epsilon": 5e-3, "learning_rate": 3e-2}
FO: Plain = {"batch": 8, "sequence_length": 64, "local_steps": 10}
ROWS: dict[str, tuple[Plain, int]] = {
    "lora": ({"id": "lora", "rank": 8, "learning_rate": 1e-3} | FO, 6),
    "core by gradients": ({"id": "lora", "adapter": CORE, "learning_rate": 1e-2} | FO, 6),
    "mezo core": ({"id": "mezo", "adapter": CORE} | ZO, 20),
    "mezo norms": ({"id": "mezo", "adapter": {"id": "norms", "layers": 6}} | ZO, 20),
    "hiso core": ({"id": "hiso", "adapter": CORE} | ZO, 20),
    "kseed core": ({"id": "kseed", "adapter": CORE, "pool": 1024} | ZO, 20),
    "mezo lora-B": (
        {"id": "mezo", "adapter": {"id": "lora", "rank": 8, "tuned": "B", "targets": ["q_proj", "v_proj"]}}
        | ZO | {"learning_rate": 3e-3, "epsilon": 2e-3},
        20,
    ),
    "ferret core": ({"id": "ferret", "adapter": CORE, "projections": 256, "learning_rate": 1e-2} | FO, 6),
}  # fmt: skip
"""Name -> a row of METHODS, and its rounds. DeComFL on one device is MeZO: they differ in whose directions they are."""


@dataclasses.dataclass(frozen=True)
class Point:
    """Where a curve stands after `rounds`; bytes and forwards since its start, loss in nats a target, accuracy 0 to 1."""

    rounds: int
    forwards: int
    seconds: float
    bytes_up: int
    loss: float
    accuracy: float


def main() -> None:
    args = _arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "curves.json"
    curves: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for seed in range(args.seeds):
        for name in args.rows:
            key = f"{name}, seed {seed}"
            if key not in curves:
                found = [dataclasses.asdict(point) for point in curve(name, seed, args)]
                curves = (json.loads(path.read_text()) if path.exists() else {}) | {key: found}
                path.write_text(json.dumps(curves, indent=1))
    _picture(curves, args.out / "curves.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--labels", type=lambda text: text.split(","), default=[], help="answers to choose among")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rows", nargs="+", choices=sorted(ROWS), default=list(ROWS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=96, help="test examples measured")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--every", type=int, default=4, help="rounds between two measurements")
    parser.add_argument("--out", type=Path, default=Path("zeroth-order"))
    return parser.parse_args()


def curve(name: str, seed: int, args: argparse.Namespace) -> list[Point]:
    """One method from the base on, measured every few rounds."""
    table, rounds = ROWS[name]
    method: Method = spec.build(METHODS, table)
    base = bases.find(BaseRef(args.model, "int4-onnx"))
    adapter = method.tunes()
    layout = adapter.layout(base)
    engine = _engine(method, base, adapter, layout, args.threads)
    length = method.sequence_length
    train = engine.tokenize(_short(data.read(args.train), engine, length), length)
    test = _short(data.read(args.test)[: args.held_out], engine, length)
    directions = method.directions()
    state = Trajectory.start(directions or Directions(), adapter.initial(layout, seed))
    points = [_point(engine, state.adapter, test, args.labels, length, 0, 0, 0.0, 0)]
    forwards, seconds, sent = 0, 0.0, 0
    for number in range(1, rounds + 1):
        key = state.directions.key(seed, number, "device")
        trained = method.train(engine, state, train, Draw(1000 * seed + number, key, (number - 1) / rounds))
        state = _moved(state, trained.update, key)
        forwards, seconds = forwards + trained.forwards, seconds + trained.seconds
        sent += len(trained.update.encode(layout)) if isinstance(trained.update, Scalars) else 4 * layout.size
        if number % args.every == 0 or number == rounds:
            points.append(_point(engine, state.adapter, test, args.labels, length, number, forwards, seconds, sent))
            print(name, seed, points[-1], flush=True)
    return points


def _engine(method: Method, base: Any, adapter: Adapter, layout: Any, threads: int) -> Any:
    chosen: Any = spec.row_class(ENGINES, "onnx" if method.forward_only else "torch")
    return chosen.load(base, adapter, layout, threads=threads)


def _moved(state: Trajectory, update: Delta | Scalars, key: int) -> Trajectory:
    if isinstance(update, Delta):
        return dataclasses.replace(state, adapter=state.adapter + update.vector)
    units = update.units if state.sums is None else update.units + state.sums
    return state.after(Step(((key, units),)))


def _short(examples: Sequence[Example], engine: Any, length: int) -> list[Example]:
    """Questions cut so that the answer fits into `length` tokens."""
    made = []
    for example in examples:
        asked, *rest = example.messages
        room = length - len(engine._text.prompt("", raw=False)) - 8
        kept = engine._text.decoded(engine._text.ids(asked.content)[:room])
        made.append(Example(messages=(Message(asked.role, f"{kept}\nTopic?"), *rest)))
    return made


def _point(
    engine: Any,
    adapter: Vector,
    test: list[Example],
    labels: list[str],
    length: int,
    rounds: int,
    forwards: int,
    seconds: float,
    sent: int,
) -> Point:
    engine.write(adapter)
    total, targets = engine.loss(engine.tokenize(test, length))
    right = [_chosen(engine, example, labels, length) for example in test] if labels else []
    accuracy = float(np.mean(right)) if right else float("nan")
    return Point(rounds, forwards, round(seconds, 1), sent, round(total / targets, 4), round(accuracy, 4))


def _chosen(engine: Any, example: Example, labels: list[str], length: int) -> bool:
    """Whether the right answer is the likeliest of `labels`, by the likelihood of the whole answer."""
    asked, right = example.messages
    answers = [Example(messages=(asked, Message("assistant", label))) for label in labels]
    sequences: list[Tokens] = engine.tokenize(answers, length)
    losses = [engine.loss([sequence])[0] for sequence in sequences]
    return labels[int(np.argmin(losses))] == right.content


def _picture(curves: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for side, by in zip(axes, ("forwards", "bytes_up"), strict=True):
        for name, points in curves.items():
            side.plot([max(1, p[by]) for p in points], [p["loss"] for p in points], "o-", ms=3, label=name)
        side.set(xlabel=by.replace("_", " "), ylabel="held-out loss (nats a target)", xscale="log")
        side.spines[["top", "right"]].set_visible(False)
    axes[1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
