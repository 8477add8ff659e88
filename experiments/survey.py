"""The survey's methods (arXiv 2503.12016) as runs: each a row of tables that a run's spec has, and what it is compared with.

`docs/methods.md` is generated from these rows (`experiments/method_table.py`); `edgetune experiment benchmark` plays them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from edge_client.methods import METHODS, Method
from experiments.rows import ROWS
from wire import spec
from wire.spec import Plain

Who = Literal["federation", "each alone", "all in one place", "nobody"]


@dataclasses.dataclass(frozen=True)
class Row:
    """`family` is the survey's. `method` is a table of a run's spec without its schedule (steps, batch, length); `run` has the
    other tables. `who` learns: a federation, or, to compare with, something simpler. `ranks`: of the devices in turn, where
    they differ. `kept`: the layers of the emulator on which devices tune in the whole model's place. `tested`: where its
    arithmetic is tested. `first`: the method of a stage before, which has half of the rounds, and from whose release this one
    starts."""

    family: str
    paper: str
    method: Plain
    run: Plain = dataclasses.field(default_factory=dict)
    who: Who = "federation"
    ranks: tuple[int, ...] = ()
    kept: str = ""
    tested: str = ""
    first: Plain | None = None

    @property
    def forward_only(self) -> bool:
        found: Method = spec.build(METHODS, self.method)
        return found.forward_only


RANK = 8
TARGET: Plain = {"id": "lora", "rank": 8, "alpha": 16.0}
RATE = 1e-3
"""The learning rate that most rows have in common; a row with another has found it itself."""
LORA: Plain = {"id": "lora", "rank": RANK, "alpha": 16.0, "learning_rate": RATE}
CORE: Plain = {"id": "lora_sb", "rank": RANK, "layers": 6}
LOSSES: Plain = {"adapter": CORE, "epsilon": 5e-3, "learning_rate": 3e-2}
"""Along random directions a small adapter of the last layers learns most (docs/zeroth-order.md)."""
SEARCH: Plain = {
    "id": "bpt", "adapter": {"id": "projected_prompt", "length": 8, "dimensions": 64}, "local_steps": 2, "population": 8,
}  # fmt: skip
"""A generation costs as many forwards as its population: few of them, in few dimensions."""
RANKS = (2, 4, 8, 8)
OUTER: Plain = {"id": "momentum", "learning_rate": 0.7, "momentum": 0.9, "nesterov": True}
ADAPTIVE: Plain = {"portions": {"id": "segments", "count": 4, "density": {}}, "codec": "int8"}
"""EcoLoRA's segments with as many entries as the loss asks for; what is zero takes part of a bit in an `int8` payload."""
SPARSE: list[Plain] = [{"id": "top_k", "fraction": 0.25}, {"id": "rice"}, {"id": "pack"}]
PACKED: Plain = {
    "codec": [{"id": "error_feedback", "inner": [{"id": "chunk_top_k"}], "decay": 0.95}, {"id": "pack"}],
    "downlink": {"codec": [{"id": "top_k", "fraction": 0.0626}, {"id": "rice"}, {"id": "pack"}]},
}
"""SparseLoCo's 64 of 4096 up; down all that four devices sent together, as it is."""
ANY_RANK: Plain = {"portions": {"id": "tuned", "least_rank": 1}}


def _lora(paper: str, tested: str, run: Plain | None = None, **adapter: Any) -> Row:
    """Low-rank factors by gradients; `adapter` changes what is tuned."""
    changed = {"adapter": TARGET | adapter} if adapter else {}
    return Row("LoRA", paper, LORA | changed, run or {}, tested=tested)


def _ranks(paper: str, tested: str, run: Plain, **adapter: Any) -> Row:
    made = _lora(paper, tested, ANY_RANK | run, **adapter)
    return dataclasses.replace(made, family="LoRA, unequal ranks", ranks=RANKS)


def _by_gradients(family: str, paper: str, tested: str, adapter: Plain, rate: float, run: Plain | None = None) -> Row:
    return Row(family, paper, LORA | {"adapter": adapter, "learning_rate": rate}, run or {}, tested=tested)


def _losses(paper: str, tested: str, method: Plain) -> Row:
    return Row("other: zeroth order", paper, LOSSES | method, tested=tested)


BASELINES: Mapping[str, Row] = {
    "base": Row("baseline", "", LORA, who="nobody"),
    "local": Row("baseline", "", LORA, who="each alone"),
    "pooled": Row("baseline", "", LORA, who="all in one place"),
}
TERMS, AGGREGATED = "tests/edge_client/test_low_rank_terms.py", "tests/coordinator/test_individual_aggregators.py"
PORTIONS, ZEROTH = "tests/experiments/test_portions.py", "tests/edge_client/test_zeroth_order.py"
PROMPTS, SUBSPACE = "tests/edge_client/test_prompts.py", "tests/wire/test_subspace.py"
SERVER, BANKS = "tests/coordinator/test_aggregators.py", "tests/edge_client/test_banks.py"
SURVEY: Mapping[str, Row] = {
    "fedit": _lora("2305.05644", "tests/coordinator/test_aggregators.py"),
    "ffa_lora": _lora("2403.12313", "tests/coordinator/test_products.py", tuned="B"),
    "rolora": _lora("2502.01755", PORTIONS, {"portions": {"id": "alternate"}}),
    "fed_sb": _by_gradients("LoRA", "2502.15436", ZEROTH, {"id": "lora_sb", "rank": RANK}, 1e-2),
    "fedex_lora": _lora("2410.09432", AGGREGATED, {"aggregator": {"id": "fedex"}}, history=96),
    "lora_fair": _lora("2411.14961", AGGREGATED, {"aggregator": {"id": "lora_fair"}}),
    "fedrot_lora": Row("LoRA", "2602.23638", LORA | {"align": 0.5}, tested="tests/edge_client/test_alignment.py"),
    "federa": _lora("2404.18848", TERMS, start="leading"),
    "ecolora": _lora("2506.02001", PORTIONS, {"portions": {"id": "segments", "count": 4}} | ROWS["top_k_int4-up"].spec),
    "ecolora_adaptive": _lora("2506.02001", "tests/wire/test_density.py", ADAPTIVE),
    "flasc": _lora(
        "2406.05233", "tests/experiments/test_recipes.py", {"codec": SPARSE, "downlink": {"codec": SPARSE, "decay": 0.0}}
    ),
    "streaming": _lora("2501.18512", PORTIONS, {"portions": {"id": "fragments", "count": 4}, "server_optimizer": OUTER}),
    "diloco": _lora("2311.08105", SERVER, {"server_optimizer": OUTER}),
    "fedadam": _lora("2003.00295", SERVER, {"server_optimizer": {"id": "adam", "learning_rate": 1e-3}}),
    "sparseloco": Row("LoRA", "2508.15706", LORA | {"learning_rate": 1e-2}, PACKED, tested="tests/experiments/test_recipes.py"),
    "rotated_ecsq": _lora("", "tests/wire/test_ecsq.py", ROWS["rotated_ecsq"].spec),
    "hetlora": _ranks("2401.06432", AGGREGATED, {"aggregator": {"id": "hetlora"}}),
    "flexlora": _ranks("2402.11505", AGGREGATED, {"aggregator": {"id": "flexlora"}}),
    "flora": _ranks("2409.05976", AGGREGATED, {"aggregator": {"id": "flora"}}, history=88),
    "rbla": _ranks("2408.08699", SERVER, {}),
    "fedra": _lora("2311.11227", PORTIONS, {"portions": {"id": "random_layers", "layers": 15}}),
    "fedsa_lora": dataclasses.replace(_lora("2410.01463", TERMS, keeps="B"), family="LoRA, personal"),
    "dual_lora": dataclasses.replace(_lora("2406.07925", TERMS, keeps="pair"), family="LoRA, personal"),
    "ifca": dataclasses.replace(
        _lora("2006.04088", BANKS, {"portions": {"id": "bank", "names": ["first", "second"]}}), family="LoRA, several domains"
    ),
    "fedprompt": _by_gradients("prompt", "2208.12268", PROMPTS, {"id": "prompt", "length": 16}, 1e-2),
    "fedbpt": Row("prompt", "2310.01467", SEARCH, tested="tests/edge_client/test_evolution.py"),
    "prefix": _by_gradients("prompt", "2101.00190", PROMPTS, {"id": "prefix", "length": 8}, 1e-2),
    "bottleneck": _by_gradients(
        "adapter", "1902.00751", "tests/edge_client/test_selective_and_bottlenecks.py", {"id": "bottleneck", "width": 16}, 1e-3
    ),
    "fedadapter": _by_gradients(
        "adapter", "2205.10162", PORTIONS, {"id": "bottleneck", "width": 16}, 1e-3,
        {"portions": {"id": "growing", "layers": 8, "rank": 8, "rounds": 2}},
    ),
    "entries": _by_gradients(
        "selective", "2308.06522", "tests/edge_client/test_entries.py", {"id": "entries", "density": 0.01}, 1e-3
    ),
    "slora": dataclasses.replace(
        _lora("2308.06522", "tests/edge_client/test_starts.py"), first=LORA | {"adapter": {"id": "entries", "density": 0.01}}
    ),
    "norm_fit": _by_gradients("selective", "2210.01708", "tests/edge_client/test_torch_engine.py", {"id": "norms"}, 1e-2),
    "last_layers": _by_gradients(
        "selective", "2310.00247", "tests/edge_client/test_torch_engine.py", TARGET | {"layers": 8}, 1e-3
    ),
    "fedhds": dataclasses.replace(
        _lora("2410.10926", "tests/edge_client/test_selection.py", {"selection": {"share": 0.1}}), family="other: data selection"
    ),
    "chosen_layers": dataclasses.replace(
        _lora("2408.15600", "tests/edge_client/test_choosing.py", {"portions": {"id": "chosen", "layers": 8}}), family="selective"
    ),
    "fedbiot": Row(
        "other: emulator", "2406.17706", LORA | {"adapter": TARGET | {"layers": 6}},
        kept="0,3,6,9,12,15,18,21,24-29", tested="tests/quantize/test_emulator.py",
    ),
    "ferret": Row(
        "other: shared randomness", "2409.06277",
        {"id": "ferret", "adapter": CORE, "projections": 1024, "learning_rate": 0.1}, tested=ZEROTH,
    ),
    "hybrid": Row(
        "other: hybrid order", "",
        {"id": "hybrid", "rank": RANK, "layers": 8, "learning_rate": 1e-3, "learning_rate_below": 1e-4},
        tested="tests/edge_client/test_hybrid.py",
    ),
    "mezo": _losses("2305.17333", ZEROTH, {"id": "mezo"}),
    "kseed": _losses("2312.06353", ZEROTH, {"id": "kseed", "pool": 1024}),
    "decomfl": _losses("2405.15861", ZEROTH, {"id": "decomfl"}),
    "hiso": _losses("2506.02370", ZEROTH, {"id": "hiso"}),
    "fwdllm": _losses("2308.13894", ZEROTH, {"id": "fwdllm"}),
    "subzero": _losses("2410.08989", SUBSPACE, {"id": "mezo", "subspace": {"structure": "subzero", "rank": 4, "refresh": 2}}),
    "lozo": _losses("2410.07698", SUBSPACE, {"id": "mezo", "subspace": {"structure": "lozo", "rank": 2, "refresh": 2}}),
}  # fmt: skip
ALL: Mapping[str, Row] = {**BASELINES, **SURVEY}
