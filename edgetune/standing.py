"""How runs stand, for people: one line, a table of releases, and the view that `edgetune run watch` keeps up to date.

Everything fits into 80 columns, and a live view into the height of its screen: of many releases the newest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from wire.messages import ReleaseStatus, RunStatus

AROUND = 10
"""Lines of a live view that are no releases."""
COLUMNS = ("release", "digest", "updates", "held-out", "perplexity", "up", "down", "at")


def line(status: RunStatus) -> str:
    """A run in one line."""
    where = f"round {min(status.round, status.rounds)}/{status.rounds}, {status.accepted}/{status.goal} updates"
    if status.kind == "evaluate":
        where = f"all {status.rounds} rounds published, final evaluation {status.accepted}/{status.goal}"
    refused = f", refused {sum(status.refused.values())}" if status.refused else ""
    return f"{status.name}: {status.state}, {where}{refused}{': ' + status.detail if status.detail else ''}"


def text(status: RunStatus) -> RenderableType:
    """A run with all its releases and refusals."""
    return Group(Text(line(status)), releases(status.releases), *_refusals(status))


def releases(shown: Sequence[ReleaseStatus]) -> Table:
    """A row a release: held-out loss in nats a token, bytes of all its updates and of what they started from."""
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for release in shown:
        loss = release.held_out_loss
        known = ("", "") if loss is None else (f"{loss:.4f}", _short(math.exp(min(loss, 700.0))))
        sizes, at = (_size(release.bytes_up), _size(release.bytes_down)), time.localtime(release.published_at)
        updates = str(release.contributions)
        table.add_row(str(release.version), release.digest[:8], updates, *known, *sizes, time.strftime("%H:%M:%S", at))
    return table


def _short(number: float) -> str:
    return f"{number:.2f}" if number < 1e6 else f"{number:.1e}"


def _size(size: int) -> str:
    """Bytes in three or four digits.

    >>> _size(512), _size(2_600_000)
    ('512 B', '2.6 MB')
    """
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} B"


def _refusals(status: RunStatus) -> list[Text]:
    counted = sorted(status.refused.items(), key=lambda item: -item[1])
    return [Text("refused  " + ", ".join(f"{count} {reason}" for reason, count in counted))] if counted else []


class View:
    """The live view of one status, as it is at the moment of drawing."""

    def __init__(self, status: RunStatus) -> None:
        self._status = status

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        status, room = self._status, max(1, (options.height or console.height) - AROUND)
        older = len(status.releases) - room
        yield Text(f"{status.name}: {status.state}{': ' + status.detail if status.detail else ''}", overflow="ellipsis")
        yield _bars(status)
        if until := _until(status, time.time()):
            yield Text(until)
        yield Text()
        if older > 0:
            yield Text(f"{older} older releases: edgetune run status {status.name}", overflow="ellipsis", no_wrap=True)
        yield releases(status.releases[-room:])
        yield from _refusals(status)


def _bars(status: RunStatus) -> Table:
    bars = Table.grid(padding=(0, 2))
    published = max(0, len(status.releases) - 1)
    bars.add_row("rounds", f"{published} of {status.rounds}", _bar(published, status.rounds))
    what = "updates" if status.kind == "train" else "final evaluations"
    again = f", attempt {status.attempt}" if status.attempt > 1 else ""
    bars.add_row(what, f"{status.accepted} of {status.goal}{again}", _bar(status.accepted, status.goal))
    return bars


def _bar(done: int, of: int) -> ProgressBar:
    return ProgressBar(total=max(1, of), completed=done, width=30)


def _until(status: RunStatus, now: float) -> str:
    """What is being waited for, in words."""
    if status.state != "running":
        return ""
    training = f"{max(0, status.offered - status.accepted)} devices at work"
    return f"{training}, {max(0, status.deadline_at - now):.0f} s to the deadline" if status.deadline_at else training


def watch(statuses: Iterable[RunStatus]) -> RunStatus | None:
    """Show each status until the next one comes; the last."""
    seen = list[RunStatus]()
    with Live(get_renderable=lambda: View(seen[0]) if seen else "", refresh_per_second=1) as live:
        for status in statuses:
            seen[:] = [status]
            live.refresh()
    if seen and not live.console.is_terminal:
        live.console.print()  # what was drawn once, at the end, has no end of its last line
    return seen[0] if seen else None
