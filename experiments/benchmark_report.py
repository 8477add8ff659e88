"""What the benchmark found: a line for each method in each place, pictures with Pareto fronts, and one page of HTML."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import benchmark_pictures, pages, survey
from experiments.benchmark_cell import Named
from wire.spec import Plain

BUDGETS: Mapping[str, float] = {"loss_1mb": 1e6, "loss_10mb": 1e7, "loss_100mb": 1e8}
COSTS = ("mb", "seconds", "forwards", "tokens")
SMALL = 0.005
"""Nats: a gain below this is noise, and no share of it is taken."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A row in a place, means over its seeds; None for what is not known, or never reached. Losses in nats a target.

    `gap_closed`: (local - loss) / (local - pooled). `exact`, `rouge_l`: of generated answers (`experiments/answers.py`), 0 to 1.
    `forgotten`: what text of other domains has lost against the base. `own`: of the devices on their own held-out text: the
    mean, the worst tenth, the deviation between them, the Gini coefficient of what they gained, and the share that would have
    learned more alone. MB of all devices, both ways; a device's and round's in bytes. Seconds of processor time of training;
    `peak_mb` of the whole process. `..._to_target`: cost until the loss first crossed the target, between marks by a straight
    line. `loss_..mb`: the best loss within so many bytes. `error`: of aggregation, against the mean of products, relative.
    """

    row: str
    place: str
    family: str
    seeds: int
    parameters: int
    base_loss: float
    loss: float
    loss_deviation: float | None
    gap_closed: float | None
    accuracy: float | None
    base_accuracy: float | None
    exact: float | None
    rouge_l: float | None
    forgotten: float | None
    own_loss: float | None
    own_worst: float | None
    own_deviation: float | None
    own_gini: float | None
    worse_than_alone: float | None
    bytes_up: int
    bytes_down: int
    mb: float
    seconds: float
    forwards: int
    tokens: int
    peak_mb: float
    mb_to_target: float | None
    seconds_to_target: float | None
    forwards_to_target: float | None
    tokens_to_target: float | None
    loss_1mb: float | None
    loss_10mb: float | None
    loss_100mb: float | None
    error: float | None
    refused: int


def made(settings: Plain, found: Sequence[Plain], target: float) -> Plain:
    """The report. `target` is a share of what is gained with all text in one place."""
    by = {(cell["row"], cell["place"], cell["seed"]): cell for cell in found}
    keys = dict.fromkeys((cell["row"], cell["place"]) for cell in found)
    lines = [_line([_seen(cell, by, target) for cell in found if (cell["row"], cell["place"]) == key]) for key in keys]
    return {"settings": settings, "target_share": target, "lines": [dataclasses.asdict(line) for line in lines]} | {
        "cells": list(found)
    }


def _seen(cell: Plain, by: Mapping[tuple[str, str, int], Plain], target: float) -> dict[str, Any]:
    """A cell's figures under the names of Line; beside the baselines of the same place and seed, where they are there."""
    base, alone, pooled = (by.get((name, cell["place"], cell["seed"])) for name in survey.BASELINES)
    first, last = _start(cell, base), cell["points"][-1]
    share = max(1, last["round"]) * cell["devices"]
    return {
        "row": cell["row"], "place": cell["place"], "family": survey.ALL[Named.of(cell["row"]).method].family,
        "parameters": cell["parameters"], "base_loss": first, "loss": last["loss"],
        "gap_closed": _gap(last["loss"], alone, pooled), "accuracy": cell["accuracy"],
        "base_accuracy": base["accuracy"] if base else None, "exact": cell["exact"], "rouge_l": cell["rouge_l"],
        "forgotten": _less(cell["general"], base["general"] if base else None),
        "bytes_up": last["bytes_up"] / share, "bytes_down": last["bytes_down"] / share, "mb": _mb(last),
        "seconds": last["seconds"], "forwards": last["forwards"], "tokens": last["tokens"],
        "peak_mb": cell["peak_memory"] / 1e6, "refused": cell["refused"] is not None,
        "error": _mean([e for e in cell["errors"] if e is not None]),
    } | fairness(cell["own"], base and base["own"], alone and alone["own"]) | _to_target(cell, first, pooled, target) | {
        name: _within(cell, budget) for name, budget in BUDGETS.items()
    }  # fmt: skip


def _start(cell: Plain, base: Plain | None) -> float:
    return float((base or cell)["points"][0]["loss"])


def _mb(point: Plain) -> float:
    return float(point["bytes_up"] + point["bytes_down"]) / 1e6


def _less(value: float | None, reference: float | None) -> float | None:
    return None if value is None or reference is None else value - reference


def _gap(loss: float, alone: Plain | None, pooled: Plain | None) -> float | None:
    if alone is None or pooled is None:
        return None
    low, high = pooled["points"][-1]["loss"], alone["points"][-1]["loss"]
    return float((high - loss) / (high - low)) if high - low > SMALL else None


def fairness(own: Mapping[str, float], base: Mapping[str, float] | None, alone: Mapping[str, float] | None) -> Plain:
    """Of devices' losses on their own text, by the names of Line."""
    losses = sorted(loss for loss in own.values() if loss is not None)
    if not losses:
        return {}
    worst = losses[-math.ceil(len(losses) / 10) :]
    gains = [base[name] - own[name] for name in own] if base else []
    behind = [own[name] > alone[name] for name in own if name in alone] if alone else []
    return {
        "own_loss": float(np.mean(losses)), "own_worst": float(np.mean(worst)), "own_deviation": float(np.std(losses)),
        "own_gini": gini(gains), "worse_than_alone": float(np.mean(behind)) if behind else None,
    }  # fmt: skip


def gini(gains: Sequence[float]) -> float | None:
    """Mean difference between any two, over twice the mean; None where not all gain.

    >>> gini([1.0, 1.0]), gini([0.0, 1.0]), gini([-1.0, 1.0])
    (0.0, 0.5, None)
    """
    if not gains or min(gains) < 0 or sum(gains) < SMALL:
        return None
    some = np.asarray(gains)
    return float(np.abs(some[:, None] - some[None, :]).mean() / (2 * some.mean()))


def _to_target(cell: Plain, first: float, pooled: Plain | None, share: float) -> Plain:
    if pooled is None:
        return {}
    goal = first - share * (first - pooled["points"][-1]["loss"])
    curve = [(point["loss"], point | {"mb": _mb(point)}) for point in cell["points"]]
    return {f"{cost}_to_target": crossed([(loss, point[cost]) for loss, point in curve], goal) for cost in COSTS}


def crossed(curve: Sequence[tuple[float, float]], goal: float) -> float | None:
    """The cost at which a curve of (loss, cost) first gets to `goal`, between its points by a straight line.

    >>> crossed([(3.0, 0.0), (2.0, 10.0), (1.0, 20.0)], 1.5)
    15.0
    """
    for (loss, cost), (after, more) in itertools.pairwise(curve):
        if after <= goal:
            return float(cost + (more - cost) * (loss - goal) / (loss - after))
    return None


def _within(cell: Plain, budget: float) -> float:
    """The best loss at so many bytes or fewer."""
    return min(float(p["loss"]) for p in cell["points"] if p["bytes_up"] + p["bytes_down"] <= budget)


def _line(seen: Sequence[dict[str, Any]]) -> Line:
    """The means over seeds."""
    names = [field.name for field in dataclasses.fields(Line)]
    figures = {name: _mean([one.get(name) for one in seen]) for name in names[3:]}
    spread = float(np.std([one["loss"] for one in seen], ddof=1)) if len(seen) > 1 else None
    counts = {"seeds": len(seen), "loss_deviation": spread, "refused": sum(one["refused"] for one in seen)}
    whole = {name: round(figures[name]) for name in ("parameters", "bytes_up", "bytes_down", "forwards", "tokens")}
    return Line(**{name: seen[0][name] for name in names[:3]} | figures | whole | counts)


def _mean(values: Sequence[float | None]) -> Any:
    known = [value for value in values if value is not None]
    return float(f"{np.mean(known):.6g}") if known and len(known) == len(values) else None


HEAD: Mapping[str, tuple[str, str]] = {
    "row": ("method", ""), "family": ("family", ""), "seeds": ("seeds", ""),
    "parameters": ("parameters", ",d"), "loss": ("loss", ".4f"), "loss_deviation": ("± seeds", ".4f"),
    "gap_closed": ("gap closed", ".0%"), "accuracy": ("accuracy", ".0%"), "exact": ("exact match", ".0%"),
    "rouge_l": ("ROUGE-L", ".3f"), "forgotten": ("forgotten", "+.4f"),
    "own_loss": ("own loss", ".4f"), "own_worst": ("worst tenth", ".4f"), "own_deviation": ("sd of devices", ".4f"),
    "own_gini": ("Gini of gain", ".2f"), "worse_than_alone": ("worse than alone", ".0%"),
    "bytes_up": ("B up", ",d"), "bytes_down": ("B down", ",d"), "mb": ("MB in all", ",.3f"),
    "seconds": ("processor s", ",.0f"), "forwards": ("forwards", ",d"), "tokens": ("tokens", ",d"),
    "peak_mb": ("peak MB", ",.0f"),
    "mb_to_target": ("MB to target", ",.3f"), "seconds_to_target": ("s to target", ",.0f"),
    "forwards_to_target": ("forwards to target", ",.0f"), "tokens_to_target": ("tokens to target", ",.0f"),
    "loss_1mb": ("loss in 1 MB", ".4f"), "loss_10mb": ("in 10 MB", ".4f"), "loss_100mb": ("in 100 MB", ".4f"),
    "error": ("aggregation error", ".2e"), "refused": ("refused", ""),
}  # fmt: skip
"""Field of a line -> (what a person reads above it, format)."""


def _table(lines: Sequence[Plain]) -> str:
    """Of a place: the figures that any line has."""
    known = {key: how for key, how in HEAD.items() if any(line[key] is not None for line in lines)}
    rows = [["–" if line[key] is None else format(line[key], how) for key, (_, how) in known.items()] for line in lines]
    return pages.table([name for name, _ in known.values()], rows)


def shown(line: Plain) -> str:
    """One line for a terminal."""
    right = "" if line["accuracy"] is None else f"  accuracy {line['accuracy']:.0%}"
    ended = "  refused" if line["refused"] else ""
    return (
        f"{line['row']:<16} {line['place']:<20} loss {line['base_loss']:.4f} → {line['loss']:.4f}{right}"
        f"  {line['mb']:.3f} MB  {line['seconds']:.0f} s  peak {line['peak_mb']:.0f} MB{ended}"
    )


def write(report: Plain, folder: Path) -> None:
    """report.json, report.csv, a picture of fronts, curves and devices for each place, report.html."""
    pages.save(report, folder)
    pictures: dict[str, Callable[[Plain, str, Path], None]] = {
        "fronts": benchmark_pictures.fronts, "curves": benchmark_pictures.curves, "devices": benchmark_pictures.devices,
    }  # fmt: skip
    drawn = {}
    for place in dict.fromkeys(line["place"] for line in report["lines"]):
        drawn[place] = [folder / f"{name}.{place.replace('/', '-')}.png" for name in pictures]
        for draw, path in zip(pictures.values(), drawn[place], strict=True):
            draw(report, place, path)
    (folder / "report.html").write_text(page(report, drawn), encoding="utf-8")


def page(report: Plain, drawn: Mapping[str, Sequence[Path]]) -> str:
    settings, cells = report["settings"], report["cells"]
    hours = sum(cell["processor_s"] for cell in cells) / 3600
    says = (
        f"{settings['devices']} devices, {settings['rounds']} rounds, {settings['model']} in {settings['format']}, sequences"
        f" of {settings['length']} tokens; {len(cells)} cells took {hours:.2f} processor hours. <em>base</em>: nobody learns;"
        " <em>local</em>: each device alone; <em>pooled</em>: all text in one place. The target is"
        f" {report['target_share']:.0%} of what pooled gains. Losses in nats a target on held-out text; exact match and ROUGE-L,"
        f" where they are, of {settings['answers']} generated answers; B are of a device and round, MB of all; seconds are"
        " processor seconds of training, of all devices; peak memory is the whole process's. Filled marks are on the Pareto"
        " front: nothing is better and cheaper."
    )
    body = f"<p>{says}</p>"
    for place, paths in drawn.items():
        lines = [line for line in report["lines"] if line["place"] == place]
        body += f"<h2>{place}</h2>" + _table(lines) + "".join(map(pages.image, paths))
    return pages.page("The survey's methods beside each other", body, settings, cells[0]["machine"])
