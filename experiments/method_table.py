"""docs/methods.md: what each method of the survey sends, needs and goes with, found out from its row and never written by hand.

    python -m experiments.method_table > docs/methods.md

Bytes are of real payloads, encoded from a made-up delta in the layout of SmolLM2-135M; nothing is downloaded or trained.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from coordinator.rules import Rules
from edge_client.adapters import Adapter, whole_layout
from edge_client.banks import layout_of
from edge_client.choosing import steepest
from edge_client.participate import encoded
from edge_client.session import settled, view_of
from edge_client.view import View
from experiments import survey
from experiments.simulation import spec_of
from experiments.survey import Row
from wire import run_spec, spec
from wire.codecs import State
from wire.delta import RANK_AXES, Delta, Vector, layer_number
from wire.errors import EdgetuneError
from wire.portions import Portion
from wire.run_spec import RunSpec
from wire.scalars import Directions, Scalars, Step
from wire.spec import Plain
from wire.split import Split

DEVICES, ROUNDS = 4, 4
SCHEDULE: Plain = {"local_steps": 10}
HEAD = (
    "method", "family", "paper", "what travels", "numbers a round", "B up", "B down", "the coordinator needs", "codec",
    "sum suffices", "mixed ranks", "losses alone", "quantized base", "tested",
)  # fmt: skip


class Shapes:
    """SmolLM2-135M as far as layouts go: 30 layers of width 576 without biases. Its weights are all 1."""

    identity = "0" * 64
    MODULES: Mapping[str, tuple[int, int]] = {
        "self_attn.q_proj": (576, 576), "self_attn.k_proj": (192, 576), "self_attn.v_proj": (192, 576),
        "self_attn.o_proj": (576, 576), "mlp.gate_proj": (1536, 576), "mlp.up_proj": (1536, 576), "mlp.down_proj": (576, 1536),
    }  # fmt: skip

    def linears(self) -> Mapping[str, tuple[int, int]]:
        return {f"model.layers.{n}.{name}": shape for n in range(30) for name, shape in self.MODULES.items()}

    def norms(self) -> Mapping[str, int]:
        inner = ("input_layernorm", "post_attention_layernorm")
        return {f"model.layers.{n}.{name}": 576 for n in range(30) for name in inner} | {"model.norm": 576}

    def biases(self) -> Mapping[str, int]:
        return {}

    def embedding(self) -> tuple[int, int]:
        return 49_152, 576

    def embeddings(self, tokens: Sequence[int]) -> Vector:
        return np.zeros((len(tokens), 576), np.float32)

    def dequantized(self, name: str) -> Any:
        return np.ones(self.linears()[name.removesuffix(".weight")], np.float32)


@dataclasses.dataclass(frozen=True)
class Facts:
    """`numbers`: of a device and round, the mean over devices and rounds; bytes likewise. `travels`: the roles of the tensors,
    or multiples. tests/experiments/test_method_table.py plays `mixed_ranks` and `losses_alone`."""

    travels: str
    numbers: int
    bytes_up: int
    bytes_down: int
    needs: str
    codec: bool
    sum_suffices: bool
    mixed_ranks: bool
    losses_alone: bool


def run_of(row: Row, base: str = "smollm2-135m", **changes: Any) -> RunSpec:
    """The row as a run of DEVICES devices."""
    table = spec_of("methods", SCHEDULE | row.method, ROUNDS, DEVICES, {"model": base, "format": "nf4"}, 0)
    return run_spec.parse(table | {"codec": "float32"} | row.run | changes)


def facts(row: Row, base: Any) -> Facts:
    """Everything about a row that follows from it."""
    run, adapter = settled(run_of(row), base)
    rules = Rules.of(run, layout_of(run, adapter, base))
    sent = [_sent(run, adapter, base, rules, device, row.ranks) for device in range(DEVICES if row.ranks else 1)]
    numbers, up = (round(float(np.mean([each[i] for one in sent for each in one]))) for i in (0, 1))
    return Facts(
        _travels(run, adapter, base), numbers, up, _down(run, rules), _needs(run, rules), run.codec is not None,
        _sum_suffices(run, rules), mixes_ranks(row, base), takes_losses(adapter, base),
    )  # fmt: skip


def _sent(
    run: RunSpec, adapter: Adapter, base: Any, rules: Rules, number: int, ranks: Sequence[int]
) -> list[tuple[int, int]]:
    """(numbers, bytes) of each round of a device. Where nothing changes from round to round, the first stands for all."""
    device, rank = f"device-{number}", ranks[number % len(ranks)] if ranks else None
    view, kept = view_of(run, adapter, base, rank), None
    found = []
    for at in range(1, ROUNDS + 1 if run.portions else 2):
        portion = _some(view, view.portion(at, device))
        payload, kept = encoded(_update(run, view, at), view, portion, rules.codec, kept)
        found.append((_numbers(run, view, portion), len(payload)))
    return found


def _some(view: View, most: Portion | None) -> Portion | None:
    """As many layers as a device may choose, where it chooses."""
    if most is None or view.rule is None or view.rule.choose is None:
        return most
    return steepest(view.shared, most, np.ones(view.shared.size, np.float32), view.rule.choose)


def _update(run: RunSpec, view: View, number: int) -> Delta | Scalars | Split:
    """As a device might make it: a delta of Laplacian entries, multiples that are all different from zero."""
    chance = np.random.Generator(np.random.Philox(key=number))
    if run.codec is None:
        return _multiples(run, chance)
    drawn = (1e-3 * chance.laplace(size=view.layout.size)).astype(np.float32)
    if run.directions is None:
        return Delta(view.layout, drawn)
    below = _below(run, view)
    upper = view.shared.above(below)
    return Split(view.shared, below, _multiples(run, chance), Delta(upper, drawn[: upper.size]))


def _multiples(run: RunSpec, chance: np.random.Generator) -> Scalars:
    values = 0.01 * chance.standard_normal(_along(run).count)
    values[_measured(run) :] = 0.0
    return Scalars.of(_along(run), values)


def _measured(run: RunSpec) -> int:
    """Multiples that a device sends: all, but of a pool, and of candidates, those of the directions along which it measured."""
    some = _along(run).drawn == "pool" or "candidates" in run.method
    return run.method["local_steps"] * run.method["perturbations"] if some else _along(run).count


def _along(run: RunSpec) -> Directions:
    assert run.directions is not None, "a run without a codec has directions"
    return run.directions


def _below(run: RunSpec, view: View) -> int:
    """Tensors below the cut that the method names."""
    first = 1 + max(layer_number(t.name) or 0 for t in view.shared.tensors) - run.method["layers"]
    return sum((layer_number(t.name) or 0) < first for t in view.shared.tensors)


def _numbers(run: RunSpec, view: View, portion: Portion | None) -> int:
    if run.codec is None:
        return _measured(run)
    if run.directions is not None:
        return view.shared.above(_below(run, view)).size + run.directions.count
    return view.shared.size if portion is None else portion.layout(view.shared).size


def _travels(run: RunSpec, adapter: Adapter, base: Any) -> str:
    if run.codec is None:
        return "multiples"
    tensors = [t for t in adapter.layout(base).tensors if not t.role.startswith("history")]
    roles = dict.fromkeys(
        t.name.rsplit(".", 1)[-1] if t.role == "other" else t.role.replace("lora_", "") for t in tensors
    )
    named = ", ".join(roles)
    named += f" ({run.portions['id']})" if run.portions else ""
    return f"multiples; {named} of {run.method['layers']} layers" if run.directions else named


def _down(run: RunSpec, rules: Rules) -> int:
    """What a device fetches that has the release before."""
    if run.codec is None:
        strands = DEVICES if _along(run).drawn == "device" else 1
        return len(Step(tuple((n, np.ones(_along(run).count, np.int64)) for n in range(strands))).to_bytes())
    if rules.downlink is None:
        return rules.snapshot_bytes
    chance = np.random.Generator(np.random.Philox(key=0))
    drawn = (1e-3 * chance.laplace(size=rules.layout.size)).astype(np.float32)
    state: State = rules.downlink.init(rules.layout)
    return min(rules.snapshot_bytes, len(rules.downlink.encode(Delta(rules.layout, drawn), state)[0]))


def _needs(run: RunSpec, rules: Rules) -> str:
    if run.codec is None:
        return "sums of multiples"
    aggregator, optimizer = run.aggregator["id"], run.server_optimizer["id"]
    added = [optimizer] if rules.optimizer.state_size(1) else []
    added += ["owner counts"] if run.portions and aggregator == "mean" else []
    return " + ".join(["a sum" if aggregator == "mean" else f"every update ({aggregator})", *added])


def _sum_suffices(run: RunSpec, rules: Rules) -> bool:
    """Whether the coordinator needs no update by itself, only what they add up to."""
    own = run.directions is not None and run.directions.drawn == "device"
    return not rules.aggregator.individual and not own


def mixes_ranks(row: Row, base: Any) -> bool:
    """Whether devices of half the rank can take part."""
    if "portions" in row.run and row.run["portions"]["id"] != "tuned":
        return False
    try:
        run, adapter = settled(run_of(row, portions={"id": "tuned", "least_rank": 1}), base)
        Rules.of(run, adapter.layout(base))
        narrow = view_of(run, adapter, base, 4)
    except EdgetuneError:
        return False
    axes = any(tensor.role in RANK_AXES for tensor in narrow.shared.tensors)
    return axes and narrow.layout.size < whole_layout(adapter, base).size


def takes_losses(adapter: Adapter, base: Any) -> bool:
    """Whether what the row tunes can be tuned by losses alone, with scalars in the place of deltas."""
    method = {"id": "mezo", "adapter": spec.plain(adapter)}
    try:
        run, found = settled(run_spec.parse(spec_of("methods", method, 1, 1, {"model": "m", "format": "nf4"}, 0)), base)
        Rules.of(run, found.layout(base))
    except EdgetuneError:
        return False
    return True


def table() -> str:
    """The page."""
    base, yes = Shapes(), {True: "yes", False: "–"}
    rows = [f"| {' | '.join(HEAD)} |", "|" + "---|" * 4 + "---:|" * 3 + "---|" * 7]
    for name, row in survey.SURVEY.items():
        found = facts(row, base)
        paper = f"[{row.paper}](https://arxiv.org/abs/{row.paper})" if row.paper else "–"
        cells = [
            f"`{name}`", row.family, paper, found.travels, f"{found.numbers:,}", f"{found.bytes_up:,}", f"{found.bytes_down:,}",
            found.needs, yes[found.codec], yes[found.sum_suffices], yes[found.mixed_ranks], yes[found.losses_alone], "yes",
            f"`{row.tested}`",
        ]  # fmt: skip
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


PAGE = """\
# Tuning methods

Made by `python -m experiments.method_table > docs/methods.md` (`make docs`) from the rows of `experiments/survey.py`. The
families are those of the survey (arXiv 2503.12016). Every method is played by `edgetune experiment benchmark`, which
measures what it learns.

{table}

*Numbers a round*: of a device, the mean over {devices} devices where ranks differ, and {rounds} rounds
where portions do; {steps} local steps of methods
that send multiples. *B up*: the length of a real payload of as many, in the layout of SmolLM2-135M (30 layers of
width 576), coded as the row says and otherwise as float32; *B down*: what a device fetches that has the release before.
Bytes up are, beside a head of a few dozen bytes and a bit for each tensor where portions are sent:

| form | bytes |
|---|---|
| deltas | numbers × the codec's bits / 8: 32 as float32; docs/bandwidth.md has the other codecs |
| multiples | 23 + numbers × 2 (16 bits each) |
| multiples of a pool, and of chosen candidates (`fwdllm`) | 23 + numbers × 4 (each names its direction) |

*Codec*: whether updates are deltas, which any codec codes. *Sum suffices*: whether the coordinator needs only what updates
add up to, so that a rule that hides single ones can be put before it; where it needs every update, it says so. *Mixed
ranks*: whether devices of a smaller rank can take part in the same run. *Losses alone*: whether what the method tunes can
be tuned by a zeroth-order method too. *Quantized base*: whether the base stays as it is, quantized; what a method adds to
it lies beside it. *Tested*: where its arithmetic is compared with an independent computation.
`tests/experiments/test_method_table.py` plays every row on a tiny quantized model,
and with it each yes of the last three questions; the two before follow from the row's codec and aggregator. SmolLM2 has no
biases: tuning them (BitFit) is refused there by name; `norm_fit` is its stand-in.

`fedex_lora` and `flora` are exact while the adapter's `history` has the rank for all rounds: FedEx-LoRA adds rank × (devices - 1)
a round, FLoRA the sum of its devices' ranks. From the round on in which it is full they keep the nearest of its rank.

What each method learned of the same text, and what that cost, is in docs/benchmark.md. `fedbiot` tunes on an emulator of 14 of
the 30 layers (docs/emulators.md) and is measured on the whole model. Split learning (docs/split.md) is no row: what it moves
goes to a helper, and not to the coordinator. Measured by `edgetune middle --layers 2:26 --json` and `edgetune client join
--engine split --json`, with LoRA of rank 8 on the last 4 layers and batches of 4 times 128 tokens: 0.59 MB each way a step
and 0.59 MB each way for every 4 sequences whose loss is measured, 5.3 MB each way in 2 rounds of 2 steps with 5 measurements
of 4 sequences, beside 1.3 MB a round of float32 update; and 879 MB at the device's peak, against 911 MB with `--engine torch`.
The held-out loss after it was 4.6666 against 4.6659.

`ecolora_adaptive` sends, of the segment whose turn it is, a share least + (most - least) · exp(-speed · d) of A's entries and
another of B's, where d is how far the device's own held-out loss has fallen since its first round, so that nothing new travels.
B up is that of d = 0, the most.

`slora` is SLoRA's two stages, two runs: half of the rounds tune `entries` of the weights, which send what their row says, and
the other half LoRA's factors, which send what is said here, from the leading directions of what the entries came to (`edgetune
run create --start-from`). Which entries follows from a seed, so that no mask travels.

`fedhds` is FedHDS's selection within a client: when a device first takes part in a run it passes every training sequence
through the base once, takes the mean over tokens of what enters the first layer and leaves each (every layer's at length 1),
reduces these features to 8 principal components and groups them by k-means, where the paper has t-SNE and HDBSCAN; it trains on
the sequence nearest to each group's mean, and counts as many examples. The paper's second step, which clusters the clients'
centroids on the server and drops clients' groups that others have too, is left out: centroids say something of private text,
and whom to ask for leave, and how the answer would come back, has no place in the protocol. Fewer sequences save time where a
run has fewer `local_steps` for them.
"""


def page() -> str:
    return PAGE.format(table=table(), devices=DEVICES, rounds=ROUNDS, steps=SCHEDULE["local_steps"])


if __name__ == "__main__":
    sys.stdout.write(page())
