"""The survey's methods (arXiv 2503.12016) as runs: each a row of tables that a run's spec has, and what it is compared with.

`docs/methods.md` is generated from these rows (`experiments/method_table.py`); `edgetune experiment benchmark` plays them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from edge_client.methods import METHODS, Method
from experiments.rows import ROWS
from wire import spec
from wire.spec import Plain

Who = Literal["federation", "each alone", "all in one place", "nobody"]


@dataclasses.dataclass(frozen=True)
class Row:
    """`family` is the survey's. `method` is a table of a run's spec without its schedule (steps, batch, length); `run` has the
    other tables. `who` learns: a federation, or, to compare with, something simpler. `ranks`: of the devices in turn, where
    they differ. `tested`: where its arithmetic is tested."""

    family: str
    paper: str
    method: Plain
    run: Plain = dataclasses.field(default_factory=dict)
    who: Who = "federation"
    ranks: tuple[int, ...] = ()
    tested: str = ""

    @property
    def forward_only(self) -> bool:
        found: Method = spec.build(METHODS, self.method)
        return found.forward_only


LORA: Plain = {"id": "lora", "rank": 8, "alpha": 16.0, "learning_rate": 1e-3}
CORE: Plain = {"id": "lora_sb", "rank": 8, "layers": 6}
LOSSES: Plain = {"adapter": CORE, "epsilon": 5e-3, "learning_rate": 3e-2}
"""Along random directions a small adapter of the last layers learns most (docs/zeroth-order.md)."""


def _losses(paper: str, tested: str, method: Plain) -> Row:
    return Row("other: zeroth order", paper, LOSSES | method, tested=tested)


BASELINES: Mapping[str, Row] = {
    "base": Row("baseline", "", LORA, who="nobody"),
    "local": Row("baseline", "", LORA, who="each alone"),
    "pooled": Row("baseline", "", LORA, who="all in one place"),
}
SURVEY: Mapping[str, Row] = {
    "fedit": Row("LoRA", "2305.05644", LORA, tested="tests/edge_client/test_methods.py"),
    "ffa_lora": Row(
        "LoRA", "2403.12313", LORA | {"adapter": {"id": "lora", "rank": 8, "alpha": 16.0, "tuned": "B"}},
        tested="tests/edge_client/test_adapters.py",
    ),
    "fed_sb": Row(
        "LoRA", "2502.15436", LORA | {"adapter": {"id": "lora_sb", "rank": 8}, "learning_rate": 1e-2},
        tested="tests/edge_client/test_adapters.py",
    ),
    "diloco": Row(
        "LoRA", "2311.08105", LORA,
        {"server_optimizer": {"id": "momentum", "learning_rate": 0.7, "momentum": 0.9, "nesterov": True}},
        tested="tests/coordinator/test_aggregators.py",
    ),
    "fedadam": Row(
        "LoRA", "2003.00295", LORA, {"server_optimizer": {"id": "adam", "learning_rate": 1e-3}},
        tested="tests/coordinator/test_aggregators.py",
    ),
    "sparseloco": Row("LoRA", "2508.15706", LORA, ROWS["chunk_top_k"].spec, tested="tests/wire/codecs"),
    "rotated_ecsq": Row("LoRA", "", LORA, ROWS["rotated_ecsq"].spec, tested="tests/wire/codecs"),
    "last_layers": Row(
        "selective", "2310.00247", LORA | {"adapter": {"id": "lora", "rank": 8, "alpha": 16.0, "layers": 8}},
        tested="tests/edge_client/test_adapters.py",
    ),
    "norm_fit": Row(
        "selective", "2210.01708", LORA | {"adapter": {"id": "norms"}, "learning_rate": 1e-2},
        tested="tests/edge_client/test_adapters.py",
    ),
    "ferret": Row(
        "other: shared randomness", "2409.06277",
        {
            "id": "ferret", "adapter": {"id": "lora_sb", "rank": 8, "layers": 6}, "projections": 256,
            "learning_rate": 1e-2,
        },
        tested="tests/edge_client/test_ferret.py",
    ),
    "hybrid": Row(
        "other: hybrid order", "",
        {"id": "hybrid", "rank": 8, "layers": 8, "learning_rate": 1e-3, "learning_rate_below": 1e-4},
        tested="tests/edge_client/test_hybrid.py",
    ),
    "mezo": _losses("2305.17333", "test_each_step_moves_along_its_direction_by_the_measured_slope", {"id": "mezo"}),
    "kseed": _losses("2312.06353", "x", {"id": "kseed", "pool": 1024}),
    "decomfl": _losses("2405.15861", "x", {"id": "decomfl"}),
    "hiso": _losses("2506.02370", "x", {"id": "hiso"}),
    "fwdllm": _losses("2308.13894", "x", {"id": "fwdllm"}),
    "subzero": _losses(
        "2410.08989", "x", {"id": "mezo", "subspace": {"structure": "subzero", "rank": 4, "refresh": 2}}
    ),
    "lozo": _losses("2410.07698", "x", {"id": "mezo", "subspace": {"structure": "lozo", "rank": 2, "refresh": 2}}),
}  # fmt: skip
ALL: Mapping[str, Row] = {**BASELINES, **SURVEY}
