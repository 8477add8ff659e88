"""How updates and releases travel in an experiment: a codec up, and one down or whole float32 adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from wire.codecs.compositions import INT4, INT8
from wire.spec import Plain

TRAVEL = ("codec", "downlink", "rates")
"""The keys of a run spec that a row says, or leaves out where it does without."""


@dataclasses.dataclass(frozen=True)
class Row:
    """Named codecs or stages. Without `down` releases travel as float32 adapters. `growth` is that of a run's rates."""

    up: str | list[Plain]
    down: str | list[Plain] | None = None
    growth: float | None = None

    @property
    def spec(self) -> Plain:
        """The keys of a run spec that say it."""
        down = {} if self.down is None else {"downlink": {"codec": self.down}}
        rates = {} if self.growth is None else {"rates": {"growth": self.growth}}
        return {"codec": self.up} | down | rates


def _both(*stages: Plain) -> Row:
    """Stages that lose much, both ways; what a device's loses is sent later. A release's residual is the coordinator's."""
    inner, after = [s for s in stages if s["id"] != "rice"], [s for s in stages if s["id"] == "rice"]
    codec = [{"id": "error_feedback", "inner": inner}, *after, {"id": "pack"}]
    return Row(codec, codec)


ROWS: Mapping[str, Row] = {
    "float32": Row("float32"),
    "int8": Row("int8", "int8"),
    "int4": Row("int4", "int4"),
    "int4-up": Row("int4"),
    "top_k_int4-up": Row("top_k_int4"),
    "ecsq": Row("ecsq", "ecsq"),
    "rotated_ecsq": Row("rotated_ecsq", "rotated_ecsq"),
    "balanced_ecsq": Row("balanced_ecsq", "balanced_ecsq"),
    "balanced_ectcq": Row("balanced_ectcq", "balanced_ectcq"),
    "rotated_ecsq-up": Row("rotated_ecsq"),
    "rotated_ecsq_rising": Row("rotated_ecsq", "rotated_ecsq", growth=8.0),
    "top_k_int4": _both({"id": "top_k", "fraction": 0.018}, INT4, {"id": "rice"}),
    "chunk_top_k": _both({"id": "chunk_top_k", "kept": 56}),
    "random_k_int4": _both({"id": "random_k", "fraction": 0.044}, INT4),
    "count_sketch_int8": _both({"id": "count_sketch", "fraction": 0.024}, INT8),
}
"""Name -> both ways of travel. Of the rows from `ecsq` on, a parameter takes about 0.2 bits."""
