"""The rank that a device's memory allows, where a run lets devices choose."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import TYPE_CHECKING

from edge_client.adapters import Adapter, Base, whole_layout
from edge_client.methods import Method
from edge_client.view import fitting_rank, full_rank
from wire.errors import MachineError
from wire.portion_rules import rule_of
from wire.run_spec import RunSpec

if TYPE_CHECKING:
    from quantize import QuantizedBase


def affordable_rank(run: RunSpec, method: Method, base: Base, limit: int | None) -> int | None:
    """The largest rank, from the run's least to its own, at which gradient steps fit into `limit` bytes; the least where none
    does. None where all devices have one rank, for a base too small to plan, and without a limit."""
    rule = rule_of(run)
    if rule is None or rule.least_rank is None or limit is None:
        return None
    from quantize import QuantizedBase  # needed here alone: clients on small machines count megabytes

    if not isinstance(base, QuantizedBase):
        return None
    row = method.tunes()
    ranks = range(full_rank(row.layout(base)), rule.least_rank, -1)
    return next((rank for rank in ranks if _fits(row.narrowed(rank), method, base, limit)), rule.least_rank)


def _fits(row: Adapter, method: Method, base: QuantizedBase, limit: int) -> bool:
    from edge_client.engines import torch_memory

    config = SimpleNamespace(**json.loads((base.folder / "config.json").read_text(encoding="utf-8")))
    size = whole_layout(row, base).size
    try:
        torch_memory.plan(config, torch_memory.resident(base), size, method.batch, method.sequence_length, limit)
    except MachineError:
        return False
    return True


def rank_here(run: RunSpec, method: Method, base: Base, wanted: int | None, limit: int | None) -> int | None:
    """A device's rank: the one it was told, else what its memory allows; None for the run's."""
    rule = rule_of(run)
    rank = affordable_rank(run, method, base, limit) if wanted is None else wanted
    return fitting_rank(rule, rank, full_rank(method.tunes().layout(base)))
