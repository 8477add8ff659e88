"""What the quality experiment found: each row's improvement as a share of the first row's, and what it cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import pages
from wire.spec import Plain


@dataclasses.dataclass(frozen=True)
class Line:
    """A row in a domain over its seeds: means, and the deviation between seeds where there are two or more.

    Losses in nats a token. `share`: base minus final loss as a part of the first row's, same domain and seed; None where that is
    not finished or has gained nothing. Bits a parameter, and bytes of payloads, of a device and round. `times_less`: both
    directions together against the first row's, None where that is not finished or nothing was sent. `refused`: seeds that
    ended early because a coordinator would have refused an update; their final loss is that of the release before.
    """

    row: str
    domain: str
    seeds: int
    base_loss: float
    loss: float
    share: float | None
    share_deviation: float | None
    bits_up: float
    bits_down: float
    bytes_up: float
    bytes_down: float
    times_less: float | None
    seconds: float
    refused: int


def made(settings: Plain, cells: Sequence[Plain], first: str) -> Plain:
    """The report, as it is written down, of finished cells; rows are compared with those of `first`."""
    keys = dict.fromkeys((cell["row"], cell["place"]) for cell in cells)
    lines = [dataclasses.asdict(_line(*key, first, cells)) for key in keys]
    return {"settings": settings, "reference": first, "lines": lines, "cells": list(cells)}


def _line(row: str, domain: str, first: str, cells: Sequence[Plain]) -> Line:
    mine = [cell for cell in cells if (cell["row"], cell["place"]) == (row, domain)]
    pairs = [(cell, reference) for cell in mine for reference in _references(cell, first, cells)]
    shares = [_gain(cell) / _gain(reference) for cell, reference in pairs if _gain(reference) > 0]
    up, down = (float(np.mean([_each(cell, way) for cell in mine])) for way in ("bytes_up", "bytes_down"))
    whole = [_each(reference, "bytes_up") + _each(reference, "bytes_down") for _, reference in pairs]
    parameters = mine[0]["parameters"]
    return Line(
        row=row,
        domain=domain,
        seeds=len(mine),
        base_loss=round(float(np.mean([cell["points"][0]["loss"] for cell in mine])), 4),
        loss=round(float(np.mean([cell["points"][-1]["loss"] for cell in mine])), 4),
        share=round(float(np.mean(shares)), 4) if shares else None,
        share_deviation=round(float(np.std(shares, ddof=1)), 4) if len(shares) > 1 else None,
        bits_up=round(8 * up / parameters, 4),
        bits_down=round(8 * down / parameters, 4),
        bytes_up=round(up),
        bytes_down=round(down),
        times_less=round(float(np.mean(whole)) / (up + down), 1) if whole and up + down else None,
        seconds=round(float(np.mean([cell["points"][-1]["seconds"] for cell in mine])), 1),
        refused=sum(cell["refused"] is not None for cell in mine),
    )


def _references(cell: Plain, first: str, cells: Sequence[Plain]) -> list[Plain]:
    """The first row's cell of this one's domain and seed; none where that is not finished."""
    return [c for c in cells if (c["row"], c["place"], c["seed"]) == (first, cell["place"], cell["seed"])]


def _gain(cell: Plain) -> float:
    return float(cell["points"][0]["loss"] - cell["points"][-1]["loss"])


def _each(cell: Plain, way: str) -> float:
    """Bytes a device and round."""
    last = cell["points"][-1]
    sent: int = last[way]
    return sent / max(1, int(last["round"]) * int(cell["devices"]))


def write(report: Plain, folder: Path) -> None:
    """report.json, report.csv, report.md, quality.png."""
    pages.save(report, folder)
    (folder / "report.md").write_text(markdown(report) + "\n", encoding="utf-8")
    picture(report, folder / "quality.png")


def markdown(report: Plain) -> str:
    share = f"share of {report['reference']}'s gain"
    head = ["row", "domain", "seeds", "base", "final", share, "bit up", "bit down", "times less", "refused"]
    rows = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * 8]
    return "\n".join(rows + [_said(Line(**line)) for line in report["lines"]])


def _said(line: Line) -> str:
    spread = "" if line.share_deviation is None else f" ± {line.share_deviation:.1%}"
    said = [
        line.row,
        line.domain,
        f"{line.seeds}",
        f"{line.base_loss:.4f}",
        f"{line.loss:.4f}",
        "–" if line.share is None else f"{line.share:.1%}{spread}",
    ]
    said += [f"{line.bits_up:.3f}", f"{line.bits_down:.3f}", _times(line), f"{line.refused}"]
    return "| " + " | ".join(said) + " |"


def _times(line: Line) -> str:
    return "–" if line.times_less is None else f"{line.times_less:.1f}"


LOWEST, NAME_HEIGHT = -10.0, 5.0
"""Of a picture's axis, in per cent."""


def picture(report: Plain, path: Path) -> None:
    """Share of the first row's gain against bits a parameter up and down together; a panel a domain, a point a row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(line["domain"] for line in report["lines"]))
    colors = {row: f"C{n % 10}" for n, row in enumerate(dict.fromkeys(line["row"] for line in report["lines"]))}
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(5.2 * len(names), 4.2), layout="constrained", sharey=True, squeeze=False
    )
    for side, name in zip(axes[0], names, strict=True):
        _draw(side, [line for line in report["lines"] if line["domain"] == name and line["share"] is not None], colors)
        side.axhline(99, color="#888888", ls=":", lw=1)
        side.set(title=name, xscale="log", xlabel="bits a parameter, up and down together")
        side.margins(x=0.2)
        side.grid(alpha=0.3)
        side.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel(f"% of {report['reference']}'s gain in held-out loss")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw(side: Any, lines: Sequence[Plain], colors: Mapping[str, str]) -> None:
    """A point a row, the best first, whose name goes below that of a better one with about as many bits; what is below LOWEST is
    drawn there, with its figure."""
    named: list[tuple[float, float]] = []
    for line in sorted(lines, key=lambda line: -line["share"]):
        bits, share = line["bits_up"] + line["bits_down"], 100 * line["share"]
        y, name = max(share, LOWEST), line["row"] if share >= LOWEST else f"{line['row']} ({share:,.0f} %)"
        deviation = [100 * (line["share_deviation"] or 0.0)] if share >= LOWEST else [0.0]
        side.errorbar([bits], [y], deviation, fmt="o" if share >= LOWEST else "v", color=colors[line["row"]])
        beside = [place for other, place in named if abs(math.log10(other / bits)) < 0.7]
        place = min([y, *(place - NAME_HEIGHT for place in beside)])
        named.append((bits, place))
        side.annotate(name, (bits, place), xytext=(7, 0), textcoords="offset points", fontsize=8, va="center")
