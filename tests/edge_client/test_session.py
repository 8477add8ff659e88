"""Which engine and method a device takes for a run, and runs that no device could take part in."""

from __future__ import annotations

from typing import Any

import pytest

from edge_client.adapters.low_rank import LoraCore
from edge_client.engines.onnx_engine import OnnxEngine
from edge_client.engines.torch_engine import TorchEngine
from edge_client.engines.toy import ToyBase
from edge_client.session import engine_class, settled
from wire import run_spec
from wire.errors import SpecError
from wire.run_spec import RunSpec
from wire.spec import Plain

LORA = {"id": "lora", "rank": 2, "tuned": "B"}
MEZO: Plain = {"id": "mezo", "adapter": LORA, "local_steps": 8}


def run(method: Plain, forward: Plain | None = None, **more: Any) -> RunSpec:
    table = {
        "name": "r",
        "base": {"model": "toy", "format": "toy"},
        "rounds": 1,
        "cohort": {"goal": 1},
        "method": method,
    }
    return run_spec.parse(table | ({"forward_method": forward} if forward else {}) | more)


def mixed() -> RunSpec:
    base = {"model": "smollm2-135m", "format": "int4-onnx"}
    return run({"id": "lora"}, MEZO, base=base, directions={"drawn": "device", "count": 8})


def test_a_device_with_little_memory_takes_losses_where_the_run_admits_them() -> None:
    assert engine_class("auto", mixed(), 500 << 20) is OnnxEngine
    assert engine_class("auto", mixed(), 2 << 30) is TorchEngine
    assert engine_class("auto", mixed()) is TorchEngine
    assert engine_class("torch", mixed(), 500 << 20) is TorchEngine


@pytest.mark.parametrize("forward", ["lora", "ferret", "hybrid"])
def test_a_forward_method_that_needs_gradients_is_refused_by_name(forward: str) -> None:
    with pytest.raises(
        SpecError, match=rf"forward_method.id: '{forward}' needs gradients; choose one of bpt, decomfl, fwdllm"
    ):
        settled(run({"id": "lora", "adapter": LORA}, {"id": forward, "adapter": LORA}), ToyBase())


def test_hybrid_order_needs_layers_to_cut_between() -> None:
    with pytest.raises(SpecError, match="numbered layers to cut between"):
        settled(run({"id": "hybrid"}), ToyBase())


def test_a_core_between_the_directions_of_zeros_is_refused() -> None:
    with pytest.raises(SpecError, match="weights are zero"):
        LoraCore().layout(ToyBase())


def test_directions_that_differ_are_refused_with_both() -> None:
    other = MEZO | {"local_steps": 9}
    with pytest.raises(SpecError, match="8 drawn by device in 16 bits and 9 drawn by device"):
        settled(run(MEZO, other), ToyBase())
