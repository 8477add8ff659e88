"""What the bandwidth experiment found: a table, curves, and one page of HTML that needs nothing beside it."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import pages
from wire.spec import Plain

BYTES, TIME = "bytes.png", "time.png"


@dataclasses.dataclass(frozen=True)
class Line:
    """A row at a link, means over its seeds. Losses in nats a token; MB of all clients together; seconds from the first task.

    `gain_share`: base minus final loss, as a part of the first row's. `seconds_to_target` and `wire_mb_to_target`: when the first
    release at or below the target was published; None if a seed never got there.
    """

    row: str
    link: str
    seeds: int
    loss: float
    gain_share: float
    payload_mb_up: float
    payload_mb_down: float
    wire_mb_up: float
    wire_mb_down: float
    overhead_bytes: float
    seconds: float
    seconds_to_target: float | None
    wire_mb_to_target: float | None


def made(settings: Plain, cells: Sequence[Plain], share: float) -> Plain:
    """The report, as it is written down. `share` of the first row's gain in loss is the target."""
    first = cells[0]["row"]
    keys = dict.fromkeys((cell["row"], cell["place"]) for cell in cells)
    lines = [_line(row, place, first, cells, share) for row, place in keys]
    return {
        "settings": settings, "target_share": share, "reference": first,
        "lines": [dataclasses.asdict(line) for line in lines], "cells": list(cells),
    }  # fmt: skip


def _line(row: str, place: str, first: str, cells: Sequence[Plain], share: float) -> Line:
    mine = [cell for cell in cells if (cell["row"], cell["place"]) == (row, place)]
    references = [_gain(_reference(cell, first, cells)) for cell in mine]
    reached = [
        _reached(cell, _measured(cell)[0]["loss"] - share * gain) for cell, gain in zip(mine, references, strict=True)
    ]
    everywhere = None not in reached
    mean = _mean_of(mine)
    return Line(
        row=row,
        link=place,
        seeds=len(mine),
        loss=round(float(np.mean([_measured(cell)[-1]["loss"] for cell in mine])), 4),
        gain_share=round(float(np.mean([_gain(c) / g for c, g in zip(mine, references, strict=True)])), 4),
        payload_mb_up=mean(lambda cell: cell["total"]["payload_up"] / 1e6),
        payload_mb_down=mean(lambda cell: cell["total"]["payload_down"] / 1e6),
        wire_mb_up=mean(lambda cell: cell["total"]["wire_up"] / 1e6),
        wire_mb_down=mean(lambda cell: cell["total"]["wire_down"] / 1e6),
        overhead_bytes=mean(lambda cell: cell["overhead_bytes"]),
        seconds=mean(lambda cell: cell["releases"][-1]["seconds"]),
        seconds_to_target=round(float(np.mean([r["seconds"] for r in reached if r])), 4) if everywhere else None,
        wire_mb_to_target=round(float(np.mean([_wire_mb(r) for r in reached if r])), 4) if everywhere else None,
    )


def _mean_of(mine: Sequence[Plain]) -> Callable[[Callable[[Plain], float]], float]:
    return lambda of: round(float(np.mean([of(cell) for cell in mine])), 4)


def _reference(cell: Plain, first: str, cells: Sequence[Plain]) -> Plain:
    """The first row's cell of this one's link and seed; of itself where that is not finished."""
    same = [c for c in cells if (c["row"], c["place"], c["seed"]) == (first, cell["place"], cell["seed"])]
    return same[0] if same else cell


def _measured(cell: Plain) -> list[Plain]:
    """The releases whose loss is known."""
    return [release for release in cell["releases"] if release["loss"] is not None]


def _gain(cell: Plain) -> float:
    known = _measured(cell)
    return float(known[0]["loss"] - known[-1]["loss"])


def _reached(cell: Plain, target: float) -> Plain | None:
    return next((release for release in _measured(cell) if release["loss"] <= target), None)


def _wire_mb(release: Plain) -> float:
    return float(release["wire_up"] + release["wire_down"]) / 1e6


def write(report: Plain, folder: Path) -> None:
    """report.json, report.csv, the pictures, report.html."""
    pages.save(report, folder)
    pictures(report, folder)
    (folder / "report.html").write_text(page(report, folder), encoding="utf-8")


HEAD = {
    "row": "row", "link": "Mbit/s up/down", "seeds": "seeds", "loss": "final loss", "gain_share": "gain", "payload_mb_up":
    "payload MB up", "payload_mb_down": "payload MB down", "wire_mb_up": "socket MB up", "wire_mb_down": "socket MB down",
    "overhead_bytes": "overhead B", "seconds": "seconds", "seconds_to_target": "s to target",
    "wire_mb_to_target": "MB to target",
}  # fmt: skip
"""Field of a line -> what a person reads above it."""


def shown(line: Plain) -> str:
    """One line of the table for a terminal."""
    row, link, _, loss, gain, *_, seconds, after, mb = _said(line)
    up, down = f"{line['wire_mb_up']:.3f}", f"{line['wire_mb_down']:.3f}"
    target = "never at the target" if after == "never" else f"at the target after {after} s and {mb} MB"
    return f"{row:<18} {link:>9}  loss {loss}  gain {gain:>6}  {up} MB up, {down} down  {seconds} s, {target}"


def _said(line: Plain) -> list[str]:
    return [_one(key, line[key]) for key in HEAD]


def _one(key: str, value: Any) -> str:
    if value is None:
        return "never"
    formats = {
        "loss": ".4f",
        "gain_share": ".1%",
        "seconds": ".1f",
        "seconds_to_target": ".1f",
        "overhead_bytes": ",.0f",
    }
    return format(value, formats.get(key, ".3f" if isinstance(value, float) else ""))


def pictures(report: Plain, folder: Path) -> None:
    """Loss against bytes on the sockets, and against time, a panel a link; a line a row, every seed of it."""
    _panels(report, folder / BYTES, _wire_mb, "MB on the socket, up and down, all clients", log=True)
    _panels(report, folder / TIME, lambda release: float(release["seconds"]), "seconds since the first task", log=False)


def _panels(report: Plain, path: Path, across: Callable[[Plain], float], name: str, log: bool) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    links = list(dict.fromkeys(cell["place"] for cell in report["cells"]))
    rows = list(dict.fromkeys(cell["row"] for cell in report["cells"]))
    width = 4.2 * len(links) + 1.6
    figure, axes = pyplot.subplots(1, len(links), figsize=(width, 4), layout="constrained", sharey=True, squeeze=False)
    for side, link in zip(axes[0], links, strict=True):
        for cell in (cell for cell in report["cells"] if cell["place"] == link):
            known = [
                r for r in _measured(cell) if across(r) > 0 or not log
            ]  # the base has cost nothing, and a log scale no zero
            at = rows.index(cell["row"])
            side.plot(
                [across(r) for r in known], [r["loss"] for r in known], "o-", ms=3, color=pages.COLORS[at % len(pages.COLORS)],
                label=cell["row"] if cell["seed"] == 0 else None,
            )  # fmt: skip
        side.set(title=f"{link} Mbit/s up/down", xlabel=name, xscale="log" if log else "linear")
        side.grid(alpha=0.3)
        side.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("held-out loss (nats a token)")
    axes[0][-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def page(report: Plain, folder: Path) -> str:
    """The whole report as one page; its pictures are in it."""
    settings, reference = report["settings"], html.escape(report["reference"])
    says = (
        f"{settings['clients']} clients and a coordinator, {settings['rounds']} rounds, {html.escape(str(settings['model']))};"
        f" round trip {settings['round_trip_ms']:g} ms; every client behind a link of its own. Every cell was really run:"
        " no time is reckoned from another link's."
    )
    body = f"""<p>{says}</p>
<p>Losses in nats a token on the clients' own held-out text. <em>gain</em>: base minus final loss, as a share of {reference}'s.
<em>payload</em>: updates and releases themselves. <em>socket</em>: what TCP carried, calls, framing and retries included.
<em>overhead</em>: socket less payload, a client and round. The target is {report["target_share"]:.0%} of {reference}'s gain
on the same link with the same seed, reached by a release when it is published.</p>
{pages.table(list(HEAD.values()), [_said(line) for line in report["lines"]])}
<h2>Loss against bytes</h2>{pages.image(folder / BYTES)}
<h2>Loss against time</h2>{pages.image(folder / TIME)}"""
    return pages.page("Quality against bytes", body, settings, report["cells"][0]["machine"])
