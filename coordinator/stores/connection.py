"""All that a transaction needs of an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Rows(Protocol):
    """What a statement gave."""

    @property
    def rowcount(self) -> int: ...

    def fetchone(self) -> Any: ...

    def fetchall(self) -> list[Any]: ...


class Connection(Protocol):
    """Statements of portable SQL, with `?` for each value, in a transaction that somebody else opened."""

    def execute(self, sql: str, values: Sequence[Any] = ..., /) -> Rows: ...
