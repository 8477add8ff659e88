"""Stages in a row: what `chain` and `error_feedback` are made of. Encoding runs left to right, decoding right to left."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from wire import spec
from wire.codecs import STAGES, Stage, State
from wire.codecs.kernels import Ints
from wire.delta import Vector
from wire.spec import Plain


def build(tables: Sequence[Plain], where: str) -> tuple[Stage, ...]:
    """The stages that plain tables describe. Raises SpecError naming the place."""
    return tuple(spec.build(STAGES, table, f"{where}[{i}]") for i, table in enumerate(tables))


def shapes(stages: Sequence[Stage], like: Any) -> list[Any]:
    """The shape before the first stage, between every two, and after the last."""
    all_shapes = [like]
    for stage in stages:
        all_shapes.append(stage.emits(all_shapes[-1]))
    return all_shapes


def init(stages: Sequence[Stage], like: Any) -> State:
    """Every stage's first state, under its number."""
    state: State = {}
    for i, (stage, shape) in enumerate(zip(stages, shapes(stages, like), strict=False)):
        state |= {f"{i}.{key}": value for key, value in stage.init(shape).items()}
    return state


def encode(stages: Sequence[Stage], x: Any, state: State, like: Any) -> tuple[Any, State]:
    """`x` through every stage, and the states that follow."""
    following: State = {}
    for i, (stage, shape) in enumerate(zip(stages, shapes(stages, like), strict=False)):
        mine = {key.removeprefix(f"{i}."): value for key, value in state.items() if key.startswith(f"{i}.")}
        x, mine = stage.encode(x, mine, shape)
        following |= {f"{i}.{key}": value for key, value in mine.items()}
    return x, following


def parts(stages: Sequence[Stage], y: Any, like: Any) -> Iterator[Vector] | None:
    """The inverse, tensor after tensor in row order, so that no whole vector is made; None if a stage cannot."""
    if not _in_parts(stages):
        return None
    found: Any = None
    for stage, shape in reversed(list(zip(stages, shapes(stages, like), strict=False))):
        if stage.kind == "fields":
            row: Any = stage  # neither `parts` nor `turned` is part of the protocol
            found = row.parts(y, shape) if found is None else row.turned(y, shape, found)
        else:
            y = stage.decode(y, shape)
    made: Iterator[Vector] = found
    return made


def add(stages: Sequence[Stage], y: Any, like: Any, total: Ints, fraction_bits: int, weight: int) -> bool:
    """total += weight · round(entry · 2^fraction_bits) of what `decode` gives, with no vector in between. False, and nothing
    added, where there is no such loop. Raises PayloadError, as late as at the end."""
    if not _adds(stages):
        return False
    for stage, shape in reversed(list(zip(stages, shapes(stages, like), strict=False))):
        if stage.kind == "fields":
            row: Any = stage  # `add` is no part of the protocol
            row.add(y, shape, total, fraction_bits, weight)
        else:
            y = stage.decode(y, shape)
    return True


def _adds(stages: Sequence[Stage]) -> bool:
    fields = [stage for stage in stages if stage.kind == "fields"]
    if len(fields) != 1 or not hasattr(fields[0], "add"):
        return False
    inner = getattr(fields[0], "stages", None)
    return inner is None or _adds(inner)


def _in_parts(stages: Sequence[Stage]) -> bool:
    """Whether the last field stage, or what it wraps, gives parts, and each before it turns those."""
    fields = [stage for stage in stages if stage.kind == "fields"]
    if not fields or not all(hasattr(stage, "turned") for stage in fields[:-1]):
        return False
    inner = getattr(fields[-1], "stages", None)
    return hasattr(fields[-1], "parts") if inner is None else _in_parts(inner)


def decode(stages: Sequence[Stage], y: Any, like: Any) -> Any:
    """The inverse. Raises PayloadError."""
    for stage, shape in reversed(list(zip(stages, shapes(stages, like), strict=False))):
        y = stage.decode(y, shape)
    return y
