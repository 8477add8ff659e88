"""Live progress of the demo: a bar for each client, and a line for each update that counts."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from experiments.processes import Event


class Screen:
    """`steps`: local steps of each client in all its runs."""

    def __init__(self, names: list[str], steps: list[int], federated: str, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._bars = {name: self._progress.add_task(name, total=of) for name, of in zip(names, steps, strict=True)}
        self._console, self._federated = console, federated

    def __enter__(self) -> Screen:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, event: Event) -> None:
        show = getattr(self, f"_on_{event['event']}", None)
        if show is not None:
            show(event)

    def _on_step(self, event: Event) -> None:
        name = event["client"]
        where = f"{name}  {'federated' if event['run'] == self._federated else 'alone'}"
        text = f"{where} round {event['round']}, loss {event['loss']:.3f}"
        self._progress.update(self._bars[name], advance=1, description=text)

    def _on_submitted(self, event: Event) -> None:
        if event["run"] == self._federated:
            self._console.print(f"{event['client']}: {_said(event)}", highlight=False)

    def _on_exited(self, event: Event) -> None:
        self._progress.update(self._bars[event["client"]], description=f"{event['client']}  done")


def _said(event: dict[str, Any]) -> str:
    if event["kind"] == "evaluate":
        return f"final release: own held-out loss {event['loss_before']:.4f}"
    losses = f"own held-out loss {event['loss_before']:.4f} -> {event['loss_after']:.4f}"
    return f"round {event['round']}, {losses}, {event['bytes_up']:,} bytes up, {event['seconds']:.0f} s"
