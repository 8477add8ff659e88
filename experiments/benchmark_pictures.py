"""Pictures of the benchmark: fronts of quality against cost, curves, and how devices fared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from wire.spec import Plain

FRONTS = {"mb": "MB of all devices, both ways", "peak_mb": "peak MB of the process", "seconds": "processor seconds"}
MARKS = "os^Dv<>PX"


def fronts(report: Plain, place: str, path: Path) -> None:
    """Final loss against bytes, memory and seconds; marks on the front are filled and joined."""
    pyplot = _pyplot()
    lines = [line for line in report["lines"] if line["place"] == place and line["family"] != "baseline"]
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained", sharey=True)
    for side, (by, name) in zip(axes, FRONTS.items(), strict=True):
        best = front([(line[by], line["loss"]) for line in lines])
        side.step(*zip(*(_at(lines[i], by) for i in best), strict=True), where="post", color="#999999", lw=1, zorder=0)
        for i, line in enumerate(lines):
            color = _color(i)
            side.plot(
                *_at(line, by), MARKS[i // 10 % len(MARKS)], color=color, mfc=color if i in best else "white", ms=7,
                label=line["row"],
            )  # fmt: skip
        for other in report["lines"]:
            if other["place"] == place and other["row"] in ("base", "local", "pooled"):
                side.axhline(other["loss"], color="#bbbbbb", ls=":", lw=1)
                side.annotate(
                    other["row"], (0.995, other["loss"]), xycoords=("axes fraction", "data"), fontsize=7, ha="right", va="bottom"
                )  # fmt: skip
        side.set(xlabel=name, xscale="log" if by == "mb" else "linear")
        _bare(side)
    axes[0].set_ylabel("held-out loss (nats a target)")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.suptitle(place)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


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
    """Loss against bytes, forwards and seconds as the federation goes; the mean of a row's seeds."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.6), layout="constrained", sharey=True)
    rows = list(dict.fromkeys(cell["row"] for cell in report["cells"] if cell["row"] != "base"))
    across = {"bytes": "bytes of all devices, both ways", "forwards": "forwards", "seconds": "processor seconds"}
    for side, (by, name) in zip(axes, across.items(), strict=True):
        for i, row in enumerate(rows):
            some = [c["points"] for c in report["cells"] if (c["row"], c["place"]) == (row, place)]
            means = [_mean(points) for points in zip(*some, strict=False)]
            known = [point for point in means if point[by] > 0 or by != "bytes"]  # a log scale has no zero
            style = "--" if row in ("local", "pooled") else "-"
            side.plot(
                [point[by] for point in known], [point["loss"] for point in known], MARKS[i // 10 % len(MARKS)] + style,
                color=_color(i), ms=3, lw=1.1, label=row,
            )  # fmt: skip
        side.set(xlabel=name, xscale="log" if by == "bytes" else "linear")
        _bare(side)
    axes[0].set_ylabel("held-out loss (nats a target)")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.suptitle(place)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def devices(report: Plain, place: str, path: Path) -> None:
    """Each device's loss on its own text, a row a method: a dot a device and seed, a bar at the mean."""
    pyplot = _pyplot()
    rows = list(dict.fromkeys(cell["row"] for cell in report["cells"] if cell["place"] == place))
    figure, side = pyplot.subplots(figsize=(9, 1.2 + 0.26 * len(rows)), layout="constrained")
    for i, row in enumerate(rows):
        some = [c["own"] for c in report["cells"] if (c["row"], c["place"]) == (row, place)]
        for n, name in enumerate(some[0]):
            side.plot([own[name] for own in some], [i] * len(some), "o", ms=5, color=_color(n), alpha=0.8)
        side.plot([np.mean([loss for own in some for loss in own.values()])], [i], "|", ms=14, color="black")
    side.set(
        yticks=range(len(rows)), yticklabels=rows, xlabel="loss of each device on its own held-out text", title=place
    )
    side.invert_yaxis()
    _bare(side)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)


def _mean(points: Sequence[Plain]) -> dict[str, float]:
    summed = [point | {"bytes": point["bytes_up"] + point["bytes_down"]} for point in points]
    return {by: float(np.mean([point[by] for point in summed])) for by in ("loss", "bytes", "forwards", "seconds")}


def _at(line: Plain, by: str) -> tuple[float, float]:
    return line[by], line["loss"]


def _color(number: int) -> Any:
    return f"C{number % 10}"


def _bare(side: Any) -> None:
    side.grid(alpha=0.3)
    side.spines[["top", "right"]].set_visible(False)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
