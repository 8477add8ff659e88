"""What a coordinator says as it goes: one line an event on standard error, for people or as JSON.

What can be said is in two tables. No event has a payload, a token, a key or a text of data, and a value that is not what its
field allows is not shown: names that callers choose can neither forge a line nor carry anything out.
"""

from __future__ import annotations

import datetime
import json
import re
import string
import sys
from collections.abc import Mapping
from typing import Any, Literal, Protocol, TextIO

from wire.errors import EdgetuneError, Reason
from wire.run_spec import DIGEST, NAME

Format = Literal["json", "text"]

FIELDS: Mapping[str, re.Pattern[str] | type[int] | type[float]] = {
    "run": NAME,
    "device": NAME,
    "owner": NAME,
    "administrator": NAME,
    "caller": re.compile(f"(device|admin) {NAME.pattern}"),
    "round": int,
    "attempt": int,
    "version": int,
    "release": DIGEST,
    "updates": int,
    "seconds": float,
    "free": int,
    "reserve": int,
    "reason": re.compile("|".join(Reason)),
    "method": re.compile(r"[A-Za-z]{1,32}"),
    "kind": re.compile(r"[A-Za-z]{1,64}"),
    "place": re.compile(r"[a-z0-9_.]{1,96}:[0-9]{1,6}"),
    "action": re.compile(r"[a-z]{1,16}"),
    "alarm": re.compile(r"[a-z_]{1,16}"),
}
"""Every field that a line may have, and what it may hold."""

EVENTS: Mapping[str, str] = {
    "created": "run {run} was created",
    "controlled": "run {run}: {action}",
    "sealed": "round {round} of {run} is sealed with {updates} updates",
    "published": "release {version} of {run} is published: {release}, {updates} updates, combined in {seconds} s",
    "abandoned": "round {round} of {run} is abandoned: attempt {attempt} had {updates} updates",
    "failed": "run {run} has failed: round {round} cannot be combined",
    "broken": "run {run} has failed by a mistake in edgetune: {kind} at {place}, in round {round}; please report it",
    "refused": "{method} is refused: {reason} (caller: {caller}, run: {run})",
    "invited": "an invitation was made for a device of {owner}",
    "enrolled": "device {device} is enrolled",
    "renewed": "device {device} has a new certificate",
    "revoked": "device {device} is revoked",
    "alarm": "somebody should look at device {device}: {alarm}",
    "thawed": "an administrator has looked at device {device}",
    "administrator": "administrator {administrator}: {action}",
    "little_room": "the disk has {free} bytes free, fewer than the {reserve} kept for publishing: no update or run is taken"
    " until there is room",
    "draining": "draining: no new work, calls under way may end",
}
"""Every event with the sentence for people, which names all its fields."""


class Events(Protocol):
    """Say that something has happened."""

    def __call__(self, event: str, /, **about: Any) -> None: ...


def unheard(event: str, /, **about: Any) -> None:
    """Nobody listens."""


class Lines:
    """Events as lines of `out`, standard error by default. One call is one write: lines of several replicas do not mix."""

    def __init__(self, how: Format, out: TextIO | None = None) -> None:
        self._write, self._out = {"json": _as_json, "text": _as_text}[how], out

    def __call__(self, event: str, /, **about: Any) -> None:
        out = self._out or sys.stderr
        out.write(self._write(event, shown(event, about)) + "\n")
        out.flush()


def last_words(how: Format, error: EdgetuneError) -> str:
    """What a process says that ends by an error, to whoever started it: unlike an event it may name what that person gave."""
    return (
        json.dumps({"time": _now(), "event": "ended", "error": str(error)}) if how == "json" else f"edgetune: {error}"
    )


def shown(event: str, about: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an event that have a value they may have."""
    names = [name for _, name, _, _ in string.Formatter().parse(EVENTS[event]) if name]
    return {name: about[name] for name in names if name in about and _allowed(name, about[name])}


def _allowed(name: str, value: Any) -> bool:
    rule = FIELDS[name]
    if isinstance(rule, re.Pattern):
        return isinstance(value, str) and rule.fullmatch(value) is not None
    return isinstance(value, rule) and not isinstance(value, bool)


def _as_json(event: str, about: Mapping[str, Any]) -> str:
    return json.dumps({"time": _now(), "event": event, **about})


def _as_text(event: str, about: Mapping[str, Any]) -> str:
    return f"{_now()} {EVENTS[event].format_map(_Known(about))}"


class _Known(dict[str, Any]):
    def __missing__(self, key: str) -> str:
        return "-"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
