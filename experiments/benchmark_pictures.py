"""Pictures of the benchmark: fronts of quality against cost, curves, and how devices fared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wire.spec import Plain

FRONTS = {"mb": "MB of all devices, both ways", "peak_mb": "peak MB of the process", "seconds": "processor seconds"}
ACROSS = {"mb": "MB of all devices, both ways", "forwards": "forwards", "seconds": "processor seconds"}
MARKS = "os^Dv<>PX*"
EDGE = 0.14
"""The part of a panel's width that a name takes."""


def fronts(report: Plain, place: str, path: Path) -> None:
    """Final loss against bytes, memory and seconds, a color a family; marks on the front are filled, joined and named."""
    lines = [line for line in report["lines"] if line["place"] == place and line["family"] != "baseline"]
    families = list(dict.fromkeys(line["family"] for line in lines))
    figure, axes = _panels(place)
    for side, (by, name) in zip(axes, FRONTS.items(), strict=True):
        best = [lines[i] for i in front([(line[by], line["loss"]) for line in lines])]
        joined = [line[by] for line in best], [line["loss"] for line in best]
        side.step(*joined, where="post", color="#999999", lw=1, zorder=0)
        for n, family in enumerate(families):
            look = {"color": _color(n), "marker": _mark(n), "ms": 7, "ls": ""}
            side.plot([], [], mfc="white", label=family, **look)
            for line in (line for line in lines if line["family"] == family):
                side.plot(*_at(line, by), mfc=_color(n) if line in best else "white", **look)
        _draw_baselines(side, report, place)
        side.set(xlabel=name, xscale=_scale(by, [line[by] for line in lines]))
        _name_front(side, best, by)
    low, high = axes[0].get_ylim()
    axes[0].set_ylim(low - 0.08 * (high - low), high)  # of all panels: room for the lowest names
    _explain(figure, axes[0], path)


def _scale(by: str, sent: Sequence[float]) -> str:
    """Of an axis: logarithmic for bytes, unless nobody has sent any, as where baselines alone were played: it has no zero."""
    return "log" if by == "mb" and any(value > 0 for value in sent) else "linear"


def _name_front(side: Any, best: Sequence[Plain], by: str) -> None:
    """Names below a front, where nothing else is, those of neighbors below each other; at the left edge to the right."""
    before, drop = (-1.0, -1.0), 0
    for line in best:
        x, y = side.transAxes.inverted().transform(side.transData.transform(_at(line, by)))
        close = abs(x - before[0]) < 0.2 and abs(y - before[1]) < 0.025
        before, drop = (x, y), drop + 10 if close else 0
        side.annotate(
            line["row"], _at(line, by), (5 if x < EDGE else -5, -5 - drop), textcoords="offset points", fontsize=7.5,
            ha="left" if x < EDGE else "right", va="top",
        )  # fmt: skip


def _draw_baselines(side: Any, report: Plain, place: str) -> None:
    for line in report["lines"]:
        if line["place"] == place and line["family"] == "baseline":
            side.axhline(line["loss"], color="#bbbbbb", ls=":", lw=1)
            side.annotate(
                line["row"], (0.995, line["loss"]), xycoords=("axes fraction", "data"), fontsize=7, ha="right", va="bottom"
            )  # fmt: skip


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of points (cost, loss) than which none is both no dearer and better, or as good and cheaper; by cost.

    >>> front([(1, 3.0), (2, 2.0), (3, 2.5), (2, 2.0)])
    [0, 1, 3]
    """
    order = sorted(range(len(points)), key=lambda i: points[i])
    kept: list[int] = []
    for i in order:
        if not kept or points[i][1] < points[kept[-1]][1] or points[i] == points[kept[-1]]:
            kept.append(i)
    return kept


def curves(report: Plain, place: str, path: Path) -> None:
    """Loss against bytes, forwards and seconds as the federation goes, the mean of a row's seeds: what is on a front in color,
    the others grey."""
    lines = [line for line in report["lines"] if line["place"] == place and line["row"] != "base"]
    best = _best(lines)
    figure, axes = _panels(place)
    for side, (by, name) in zip(axes, ACROSS.items(), strict=True):
        for line in lines:
            reached = [
                point for point in _points(report, line) if point[by] > 0 or by != "mb"
            ]  # a log scale has no zero
            side.plot([point[by] for point in reached], [point["loss"] for point in reached], **_style(line, best))
        side.set(xlabel=name, xscale=_scale(by, [line[by] for line in lines]))
    _explain(figure, axes[-1], path)


def _best(lines: Sequence[Plain]) -> list[str]:
    """The rows on any front."""
    rivals = [line for line in lines if line["family"] != "baseline"]
    found = [front([(line[by], line["loss"]) for line in rivals]) for by in FRONTS]
    return list(dict.fromkeys(rivals[i]["row"] for some in found for i in some))


def _style(line: Plain, best: Sequence[str]) -> Plain:
    if line["family"] == "baseline":
        return {"color": "black", "ls": "--" if line["row"] == "pooled" else ":", "lw": 1.4, "label": line["row"]}
    if line["row"] not in best:
        return {"color": "#cccccc", "lw": 0.8, "zorder": 0, "label": "other methods"}
    n = best.index(line["row"])
    return {"color": _color(n), "marker": _mark(n), "ms": 4, "lw": 1.3, "label": line["row"]}


def devices(report: Plain, place: str, path: Path) -> None:
    """Each device's loss on its own text, a row a method, the best first: a dot a device and seed, a bar at the mean."""
    pyplot = _pyplot()
    own = {
        row: [c["own"] for c in report["cells"] if (c["row"], c["place"]) == (row, place)]
        for row in dict.fromkeys(cell["row"] for cell in report["cells"] if cell["place"] == place)
    }
    means = {row: float(np.mean([loss for one in some for loss in one.values()])) for row, some in own.items()}
    rows = sorted(means, key=lambda row: means[row])
    figure, side = pyplot.subplots(figsize=(9, 1.6 + 0.24 * len(rows)), layout="constrained")
    for i, row in enumerate(rows):
        for n, name in enumerate(own[row][0]):
            losses, look = [one[name] for one in own[row]], {"ms": 5, "alpha": 0.8, "color": _color(n)}
            side.plot(losses, [i] * len(losses), _mark(n), label=name, **look)
        side.plot(means[row], i, "|", ms=14, color="black", label="mean")
    side.set(
        yticks=range(len(rows)), yticklabels=rows, ylim=(len(rows) - 0.4, -0.6),
        xlabel="loss of each device on its own held-out text (nats a target)", title=place,
    )  # fmt: skip
    _bare(side)
    _explain(figure, side, path)


def _panels(place: str) -> tuple[Any, Any]:
    figure, axes = _pyplot().subplots(1, 3, figsize=(15, 5.6), layout="constrained", sharey=True)
    axes[0].set_ylabel("held-out loss (nats a target)")
    figure.suptitle(place)
    for side in axes:
        _bare(side)
    return figure, axes


def _explain(figure: Any, side: Any, path: Path) -> None:
    """What each color says, once, below; then the picture is done."""
    handles, labels = side.get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))
    columns = max(1, round(figure.get_figwidth() / 2))
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncol=columns, fontsize=8, frameon=False)
    figure.savefig(path, dpi=140)
    _pyplot().close(figure)


def _points(report: Plain, line: Plain) -> list[Plain]:
    """A line's curve: the mean of its seeds at each mark."""
    seeds = [c["points"] for c in report["cells"] if (c["row"], c["place"]) == (line["row"], line["place"])]
    return [_mean(points) for points in zip(*seeds, strict=False)]


def _mean(points: Sequence[Plain]) -> dict[str, float]:
    summed = [point | {"mb": (point["bytes_up"] + point["bytes_down"]) / 1e6} for point in points]
    return {by: float(np.mean([point[by] for point in summed])) for by in ("loss", *ACROSS)}


def _at(line: Plain, by: str) -> tuple[float, float]:
    return line[by], line["loss"]


def _color(number: int) -> str:
    return f"C{number % 10}"


def _mark(number: int) -> str:
    return MARKS[(number + number // 10) % len(MARKS)]


def _bare(side: Any) -> None:
    side.grid(alpha=0.3)
    side.spines[["top", "right"]].set_visible(False)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
