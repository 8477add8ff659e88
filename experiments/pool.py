"""Cells in processes of their own, some at once: a cell's memory goes with it, and no cell outlives who asked for it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from experiments import cells
from experiments.cells import Cell
from wire.errors import MachineError
from wire.spec import Plain

ALONE = {"OMP_NUM_THREADS": "1"}
"""Cells are played side by side: one that multiplies on all cores waits for the others, and is charged for it."""
Tell = Callable[[str], None]
Measure = Callable[[Cell, Plain, Tell], Plain]
"""(cell, settings of its folder, how it tells where it is) -> what it found."""


def play(module: str, out: Path, wanted: Sequence[Cell], jobs: int, console: Any) -> list[str]:
    """Play each cell that is not done, `jobs` at once, as `python -m MODULE OUT ROW PLACE SEED`, whose main is `child`.

    The others go on where one fails; what was said of each that did is returned."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    todo = [cell for cell in wanted if cells.done(out, cell) is None]
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    failed: list[str] = []
    with Progress(*columns, console=console) as progress, _pool(jobs) as pool:
        bar = progress.add_task("", total=len(wanted), completed=len(wanted) - len(todo))
        each = [
            pool.submit(_process, module, out, cell, lambda said: progress.update(bar, description=said))
            for cell in todo
        ]
        for ended in as_completed(each):
            try:
                ended.result()
            except MachineError as error:
                failed.append(str(error))
                console.print(str(error), style="red", highlight=False)
            progress.advance(bar)
    return failed


def ended(failed: Sequence[str], console: Any) -> int:
    """What a command returns once its report is out; what failed is said below it."""
    for said in failed:
        console.print(said, style="red", highlight=False, soft_wrap=True)
    return 1 if failed else 0


@contextlib.contextmanager
def _pool(jobs: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that start nothing more once the program is told to stop."""
    pool = ThreadPoolExecutor(jobs)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _process(module: str, out: Path, cell: Cell, tell: Tell) -> None:
    """Raises MachineError if the cell fails."""
    line = [sys.executable, "-m", module, str(out), cell.row, cell.place, str(cell.seed)]
    with (cells.begun(out, cell) / "log.txt").open("w") as log:
        child = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | ALONE
        )  # this program itself
    with child:
        assert child.stdout is not None
        for said in child.stdout:
            tell(said.strip())
    if child.returncode != 0:
        words = (cells.folder(out, cell) / "log.txt").read_text().strip().splitlines() or ["it said nothing"]
        raise MachineError(f"cell {cell.name} failed: {words[-1]}")


def child(arguments: Sequence[str], measure: Measure) -> None:
    """One cell, of an experiment's folder, whose settings are there. It ends with the process that started it."""
    folder, row, place, seed = arguments
    threading.Thread(target=_end_with_parent, daemon=True).start()
    out, cell = Path(folder), Cell(row, place, int(seed))
    cells.finish(out, cell, measure(cell, cells.settings(out), lambda said: print(said, flush=True)))


def _end_with_parent() -> None:
    """The pipe from the process that started this one ends when that one does, even if it was killed."""
    os.read(sys.stdin.fileno(), 1)
    os._exit(1)
