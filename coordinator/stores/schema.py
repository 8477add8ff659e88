"""The ledger's schema: numbered scripts of portable SQL, applied in order and each once, whatever the engine.

A script that has been released is never changed; what a later version needs is a further script.
"""

from __future__ import annotations

from functools import cache
from importlib import resources

from coordinator.stores.connection import Connection
from wire.errors import MachineError


@cache
def scripts() -> tuple[str, ...]:
    """Every migration, oldest first: the schema's version is how many of them a ledger has seen."""
    folder = resources.files("coordinator.stores").joinpath("migrations")
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".sql")), key=lambda f: f.name)
    return tuple(f.read_text(encoding="utf-8") for f in files)


def migrate(db: Connection, held: int, place: str) -> int:
    """Bring a ledger from version `held` to this program's, inside the caller's transaction; the version it has now.

    Raises MachineError for a ledger that a newer program wrote.
    """
    known = scripts()
    if held > len(known):
        raise MachineError(
            f"{place}: written by a newer edgetune (schema {held}, this one knows {len(known)}); upgrade it"
        )
    for script in known[held:]:
        for statement in filter(str.strip, script.split(";\n")):
            db.execute(statement)
    return len(known)
