"""Whose fault an error is that comes up while one run's round is combined, signed or published. Pure."""

from __future__ import annotations

import dataclasses
import traceback

from wire.errors import EdgetuneError, PayloadError, SpecError

MACHINE = (EdgetuneError, OSError, MemoryError, ImportError)
"""What says that the store or this machine is in trouble: every run would meet it, and another process may not. Ledgers name
their engines' errors so. Of ours, a spec or payload that was taken and cannot be used is the program's mistake."""
MISTAKES = (SpecError, PayloadError)


@dataclasses.dataclass(frozen=True)
class Mistake:
    """A mistake of this program: the `kind` of error, and the module and line that raised it. What it says is left out: it may
    quote anything."""

    kind: str
    place: str

    def sentence(self, number: int) -> str:
        """For the run that ends by it, in round `number`."""
        return (
            f"round {number} met a mistake in edgetune: {self.kind} at {self.place}. Please report it; a run with another codec, "
            "aggregator or server optimizer may go on from here with `edgetune run create --start-from`"
        )


def mistake(error: Exception) -> Mistake | None:
    """None for what is no mistake of the program's: a run that diverged, the store or the machine."""
    if isinstance(error, MACHINE) and not isinstance(error, MISTAKES):
        return None
    frames = [(frame.f_globals.get("__name__", "?"), line) for frame, line in traceback.walk_tb(error.__traceback__)]
    module, line = frames[-1] if frames else ("?", 0)
    return Mistake(type(error).__name__, f"{module}:{line}")
