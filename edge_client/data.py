"""A device's own text: JSON lines in, checked examples out, and the part of them that is held out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from wire.errors import DataError

Role = Literal["system", "user", "assistant"]
ROLES = ("system", "user", "assistant")
EXPECTED = (
    'expected {"text": "…"}, {"messages": [{"role": "user", "content": "…"}, …]}, {"prompt": "…", "completion": "…"}'
    ' or {"instruction": "…", "input": "…", "output": "…"}'
)


@dataclasses.dataclass(frozen=True)
class Message:
    """One turn of a dialogue."""

    role: Role
    content: str


@dataclasses.dataclass(frozen=True)
class Example:
    """Plain text, or a dialogue of which the assistant's turns are learned. Exactly one of the two is not empty."""

    text: str = ""
    messages: tuple[Message, ...] = ()


def read(path: Path) -> list[Example]:
    """Every example of a JSON lines file. Raises DataError naming the file, the line and what was expected."""
    try:
        with path.open("rb") as file:
            examples = [example(line, f"{path}:{number}") for number, line in _filled(file)]
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; expected JSON lines") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    if not examples:
        raise DataError(f"{path}: the file is empty; each line: {EXPECTED}")
    if len(examples) < 2:
        raise DataError(f"{path}: one example only; at least two are needed, one of them to measure with")
    return examples


def _filled(lines: Any) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(lines, 1):
        line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        if line.strip():
            yield number, line


def example(line: bytes, where: str) -> Example:
    """One line as an example. Raises DataError beginning with `where`."""
    try:
        table = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8: {error.reason} at byte {error.start}") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({error}); {EXPECTED}") from error
    if not isinstance(table, dict):
        raise DataError(f"{where}: {EXPECTED}, got {_shown(table)}")
    if "text" in table:
        return Example(text=_text(table, "text", where))
    if "messages" in table:
        return Example(messages=_messages(table["messages"], where))
    return Example(messages=_turns(table, where))


def _turns(table: dict[str, Any], where: str) -> tuple[Message, ...]:
    for question, context, answer in (
        ("prompt", None, "completion"),
        ("instruction", "input", "output"),
        ("instruction", "context", "response"),
    ):
        if question in table and answer in table:
            asked = _text(table, question, where)
            if context and table.get(context):
                asked += "\n\n" + _text(table, context, where)
            return (Message("user", asked), Message("assistant", _text(table, answer, where)))
    raise DataError(f"{where}: {EXPECTED}, got the keys {', '.join(map(repr, sorted(table))) or 'of nothing'}")


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, list):
        raise DataError(f"{where}: messages: expected a list of turns, got {_shown(value)}")
    turns = tuple(_message(turn, f"{where}: messages[{i}]") for i, turn in enumerate(value))
    if not any(turn.role == "assistant" for turn in turns):
        raise DataError(f"{where}: messages: expected a turn of the role 'assistant' to learn from, got none")
    return turns


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise DataError(f"{where}: expected a table with role and content, got {_shown(turn)}")
    role = turn.get("role")
    if role not in ROLES:
        raise DataError(f"{where}: role: expected one of {', '.join(ROLES)}, got {_shown(role)}")
    return Message(cast(Role, role), _text(turn, "content", where))


def _text(table: dict[str, Any], key: str, where: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {key}: expected text, got {_shown(value)}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: {key}: half of a surrogate pair at character {error.start}") from error
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "…"


def split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """(training, held out): the same parts for the same examples and seed, on every machine; neither is empty."""
    held = min(len(examples) - 1, max(1, round(fraction * len(examples))))
    order = sorted(range(len(examples)), key=lambda i: hashlib.sha256(f"{seed}/{i}".encode()).digest())
    chosen = set(order[:held])
    training = [e for i, e in enumerate(examples) if i not in chosen]
    return training, [e for i, e in enumerate(examples) if i in chosen]
