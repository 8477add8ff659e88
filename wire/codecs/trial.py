"""A codec tried on a small update, before a run begins with it: stages fit by the fields they state, and may still lose, or write
over, what another one made."""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Iterator, Sequence

import numpy as np

from wire import spec
from wire.codecs import Fields, Shape, Stage, series
from wire.codecs.chain import Chain, shape
from wire.delta import Delta, Layout, Tensor, Vector
from wire.errors import SpecError

LAYOUT = Layout(
    (Tensor("lora_A", (9, 12), "lora_A"), Tensor("lora_B", (12, 9), "lora_B"), Tensor("gain", (16,), "gain"))
)
"""Of rank 9, above the most reflectors that `rank_rotate` has: whatever can be turned is."""
MOST_STAGES = 16
"""Of one codec, those inside others included."""


def check(codec: Chain, share: float, where: str) -> None:
    """Encode a made-up update twice, at `share` of the codec's target, and decode and fold both; milliseconds, and remembered.

    Raises SpecError, beginning with `where`, that names the stages which do not go together.
    """
    if fault := _fault(spec.canonical(codec.stages), share):
        raise SpecError(f"{where}: {fault}")


@functools.lru_cache(maxsize=256)
def _fault(stages: bytes, share: float) -> str | None:
    codec = Chain(series.build(json.loads(stages), "codec"))
    flat = list(_flat(codec.stages))
    if len(flat) > MOST_STAGES:
        return f"it has {len(flat)} stages; {MOST_STAGES} are the most"
    try:
        return _clash(flat) or _round_trip(codec, codec.rated(share))
    except Exception as error:  # whatever it is, a device or the coordinator would have ended by it
        return f"{codec} cannot code an update: {type(error).__name__}: {error}"


def _flat(stages: Sequence[Stage]) -> Iterator[Stage]:
    """The stages, and for one that wraps others those: it codes as they do in a row."""
    for stage in stages:
        inner = getattr(stage, "stages", None)
        yield from [stage] if inner is None else _flat(inner)


def _clash(stages: list[Stage]) -> str | None:
    """Which two field stages do not go together, if two alone can be named."""
    fields = [stage for stage in stages if stage.kind == "fields"]
    shapes = series.shapes(fields, shape(LAYOUT))
    coded = {"values": _values()}
    for stage, like in zip(fields, shapes, strict=False):
        coded, _ = stage.encode(coded, stage.init(like), like)
    return _lost(fields, shapes, coded)


def _lost(fields: list[Stage], shapes: list[Shape], coded: Fields) -> str | None:
    for number in reversed(range(len(fields))):
        stage, like = fields[number], shapes[number]
        coded = stage.decode(coded, like)
        if lost := sorted(set(like) - set(coded)):
            maker = _maker(fields, shapes[: number + 1], lost[0])
            return (
                f"{maker} and {stage.id} do not go together: {stage.id} loses the {lost[0]} that {maker} makes; "
                "leave one of the two out"
            )
    return None


def _maker(fields: list[Stage], shapes: list[Shape], name: str) -> str:
    """The stage that first gave a field that the last of `shapes` has."""
    made = [
        stage.id
        for stage, (old, new) in zip(fields, itertools.pairwise(shapes), strict=False)
        if name in set(new) - set(old)
    ]
    return made[-1] if made else fields[0].id


def _round_trip(codec: Chain, encoder: Chain) -> str | None:
    state = encoder.init(LAYOUT)
    for _ in range(2):
        payload, state = encoder.encode(Delta(LAYOUT, _values()), state)
        codec.decode(payload, LAYOUT)
        list(codec.parts(payload, LAYOUT) or ())
        codec.add(payload, LAYOUT, np.zeros(LAYOUT.size, np.int64), 30, 1)
        if len(payload) > codec.max_bytes(LAYOUT):
            return f"{codec} writes {len(payload)} bytes where it states at most {codec.max_bytes(LAYOUT)}"
    return None


def _values() -> Vector:
    """Float32 [LAYOUT.size] of both signs and several sizes, none of them 0."""
    at = np.arange(1, LAYOUT.size + 1)
    values: Vector = (0.01 * np.sin(1.7 * at) / np.sqrt(at)).astype(np.float32)
    return values
