"""Reports as one page of HTML that needs nothing beside it, and the tables that go with it."""

from __future__ import annotations

import base64
import csv
import html
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from wire.spec import Plain

COLORS = ("#444444", "#1b7837", "#2166ac", "#b2182b", "#e08214", "#762a83", "#35978f", "#8c510a")
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1150px; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px }
th, td { padding: 4px 9px; text-align: right; border-bottom: 1px solid #ddd } th { vertical-align: bottom }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left } img { max-width: 100% } pre { overflow: auto; font-size: 12px }
.scroll { overflow-x: auto } td:first-child, th:first-child { position: sticky; left: 0; background: #fff }
"""


def told(report: Plain, lines: Iterable[str], written: str, console: Any, as_json: bool) -> None:
    """What an experiment found, for people on `console`, a rich Console, and where it is written; with `as_json` all of it on
    standard output."""
    for line in lines:
        console.print(line, highlight=False, soft_wrap=True)
    console.print(written, highlight=False)
    if as_json:
        print(json.dumps(report))


def page(title: str, body: str, settings: Plain, machine: Plain) -> str:
    """A whole document; `body` is HTML."""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{body}
<h2>Settings</h2><pre>{html.escape(json.dumps(settings, indent=1))}</pre>
<h2>Machine and versions</h2><pre>{html.escape(json.dumps(machine, indent=1))}</pre>
</body></html>
"""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first two columns are names, all others figures."""
    above = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    below = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
    return f'<div class="scroll"><table><tr>{above}</tr>{"".join(f"<tr>{row}</tr>" for row in below)}</table></div>'


def image(path: Path) -> str:
    """A picture, inside of the page."""
    return f'<img alt="{path.stem}" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'


def save(report: Plain, folder: Path) -> None:
    """report.json, and its lines as report.csv."""
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    with (folder / "report.csv").open("w", encoding="utf-8", newline="") as file:
        written = csv.DictWriter(file, list(report["lines"][0]))
        written.writeheader()
        written.writerows(report["lines"])
