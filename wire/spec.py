"""Plain tables to frozen dataclasses and back: the one way configuration enters the program.

A *family* (codecs, methods, aggregators, ...) is a literal table `id -> "module:Class"`. `build` turns
`{"id": "top_k", "fraction": 0.25}` into `TopK(fraction=0.25)` and refuses an id that is not in the table, a key the
row does not have and a value of another type, so a spec from the network can name nothing the table does not list.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from wire.errors import SpecError

T = TypeVar("T")
Plain = dict[str, Any]
Table = Mapping[str, str]


def row_class(table: Table, row_id: object, where: str = "spec") -> type:
    """The class of a row, imported now: rows whose packages are absent cost nothing until they are named."""
    if not isinstance(row_id, str) or row_id not in table:
        raise SpecError(f"{where}: unknown id {row_id!r}; choose one of {', '.join(sorted(table))}")
    module, name = table[row_id].split(":")
    cls: type = getattr(importlib.import_module(module), name)
    return cls


def build(table: Table, spec: Mapping[str, Any], where: str = "spec") -> Any:
    """The row that a spec describes. Raises SpecError naming `where` and the key."""
    if not isinstance(spec, Mapping) or "id" not in spec:
        raise SpecError(f"{where}: expected a table with an `id`, got {spec!r}")
    cls = row_class(table, spec["id"], where)
    return parse(cls, {k: v for k, v in spec.items() if k != "id"}, where)


def told(cls: type[T], table: Any, where: str) -> T:
    """As `parse`, of what another program tells and nothing is named by: keys that it has and this one does not know are
    passed over, as in a protobuf message."""
    return parse(cls, _known(cls, table), where)


def _known(kind: Any, value: Any) -> Any:
    """`value` without the keys that the dataclasses of its annotation do not have."""
    inner = next((arg for arg in typing.get_args(kind) if dataclasses.is_dataclass(arg)), kind)
    if isinstance(value, list):
        return [_known(inner, each) for each in value]
    if not dataclasses.is_dataclass(inner) or not isinstance(value, Mapping):
        return value
    hints = typing.get_type_hints(inner)
    return {key: _known(hints[key], each) for key, each in value.items() if key in hints}


def parse(cls: type[T], spec: Mapping[str, Any], where: str) -> T:
    """A dataclass from a plain table: unknown keys, missing keys and values of another type raise SpecError."""
    if not isinstance(spec, Mapping):
        raise SpecError(f"{where}: expected a table, got {spec!r}")
    hints = _hints(cls)  # type: ignore[arg-type]  # mypy does not see that classes can be hashed
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]  # cls is a dataclass
    if unknown := sorted(set(spec) - set(fields)):
        raise SpecError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(sorted(fields))}")
    values: Plain = {}
    for name, field in fields.items():
        if name in spec:
            values[name] = convert(hints[name], spec[name], f"{where}.{name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise SpecError(f"{where}: missing key {name!r}")
    try:
        return cls(**values)
    except ValueError as error:
        raise SpecError(f"{where}: {error}") from error


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    """Once a class: each time it compiles every annotation, and took most of the time of reading a run."""
    return typing.get_type_hints(cls)


def convert(kind: Any, value: Any, where: str) -> Any:
    """One value, checked against its annotation: int, float, str, bool, tuples, dicts, optionals and dataclasses."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _first_fit([a for a in args if a is not type(None)], value, where)
    if origin is typing.Literal:
        return _checked(value in args, value, where, " or ".join(map(repr, args)))
    if origin is tuple:
        _checked(isinstance(value, list | tuple), value, where, "a list")
        return tuple(convert(args[0], v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict or kind is dict:
        return _checked(isinstance(value, dict), value, where, "a table")
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return parse(kind, value, where)
    if kind is float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(_checked(number and abs(value) < float("inf"), value, where, "a finite number"))
    if kind is int:
        return _checked(isinstance(value, int) and not isinstance(value, bool), value, where, "a whole number")
    return _checked(isinstance(value, kind), value, where, f"a {kind.__name__}")


def _first_fit(kinds: list[Any], value: Any, where: str) -> Any:
    """Raises what is wrong further in, where the value is of one of the kinds; else SpecError with all that would do."""
    wrong = []
    for kind in kinds:
        try:
            return convert(kind, value, where)
        except SpecError as error:
            wrong.append(str(error))
    begin, end = f"{where}: expected ", f", got {value!r}"
    within = [said for said in wrong if not said.startswith(begin)]
    either = " or ".join(said.removeprefix(begin).removesuffix(end) for said in wrong)
    raise SpecError(within[0] if within else f"{begin}{either}{end}")


def _checked(good: bool, value: Any, where: str, expected: str) -> Any:
    if not good:
        raise SpecError(f"{where}: expected {expected}, got {value!r}")
    return value


def since(edition: int) -> Mapping[str, int]:
    """Metadata of a field that an edition of its form added: while it is None it is absent from the plain form, so that
    whatever was named by a digest before keeps its name, and programs that know an earlier edition read it."""
    return {"since": edition}


LATER = since(2)
"""Of a field that came with the newest edition."""


def edition(row: Any) -> int:
    """The earliest edition that can say what a dataclass says, those in its fields included.

    >>> edition(1)
    1
    """
    if not dataclasses.is_dataclass(row):
        return 1
    said = [field for field in dataclasses.fields(row) if field.init and _said(row, field)]
    return max([1, *(max(int(f.metadata.get("since", 1)), edition(getattr(row, f.name))) for f in said)])


def plain(row: Any) -> Any:
    """The inverse of `build` and `parse`: plain tables, with an `id` wherever the row's class has one."""
    if dataclasses.is_dataclass(row) and not isinstance(row, type):
        table = {f.name: plain(getattr(row, f.name)) for f in dataclasses.fields(row) if f.init and _said(row, f)}
        row_id = getattr(row, "id", None)
        return {"id": row_id, **table} if isinstance(row_id, str) else table
    if isinstance(row, Mapping):
        return {k: plain(v) for k, v in row.items()}
    if isinstance(row, list | tuple):
        return [plain(v) for v in row]
    return row


def _said(row: Any, field: Any) -> bool:
    return not ("since" in field.metadata and getattr(row, field.name) is None)


def canonical(value: Any) -> bytes:
    """JSON with sorted keys, no spaces, UTF-8: the bytes that digests are taken of."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(value: Any) -> str:
    """SHA-256, as 64 hexadecimal digits, of the canonical form of `value`.

    >>> digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
    True
    """
    return hashlib.sha256(canonical(value)).hexdigest()


def bytes_digest(data: bytes | memoryview) -> str:
    """SHA-256 of bytes, as 64 hexadecimal digits: the name a store keeps them under."""
    return hashlib.sha256(data).hexdigest()
