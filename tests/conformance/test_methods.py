"""Every row of METHODS: its config survives, its update is of a form its run admits, and combining it moves the adapter."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from edge_client.data import Example
from edge_client.engines.torch_engine import TorchEngine
from edge_client.methods import METHODS
from experiments.simulation import Simulation
from quantize import QuantizedBase
from quantize.base_model import build
from tests.models import tiny_llama
from wire import run_spec, spec
from wire.delta import Delta
from wire.scalars import Scalars
from wire.split import Split

SMALL: dict[str, Any] = {"local_steps": 4, "batch": 2, "sequence_length": 24, "learning_rate": 1e-2}
CHANGES: dict[str, dict[str, Any]] = {
    "bpt": {"adapter": {"id": "prompt", "length": 2}, "sigma": 0.05},
    "kseed": {"pool": 32}, "ferret": {"projections": 16}, "hybrid": {"layers": 1, "adapter": {"id": "lora_sb", "rank": 4}},
}  # fmt: skip
TEXT = "The quick brown fox jumps over the lazy dog. " * 8


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> QuantizedBase:
    folder = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)
    return build(str(tiny_llama(folder / "model")), "bf16", folder / "bf16")


def small(row: str) -> dict[str, Any]:
    """A small configuration of a row."""
    known = {field.name for field in dataclasses.fields(spec.row_class(METHODS, row))}
    return {"id": row} | {key: value for key, value in SMALL.items() if key in known} | CHANGES.get(row, {})


def simulation(row: str, base: QuantizedBase, more: dict[str, Any] | None = None) -> Simulation:
    table = {
        "name": "conformance",
        "base": {"model": "tiny", "format": "bf16"},
        "rounds": 2,
        "cohort": {"goal": 2},
        "method": small(row),
        "codec": "int8",
    }
    return Simulation(run_spec.parse(table | (more or {})), base, TorchEngine, 1, None)


@pytest.mark.parametrize("row", METHODS)
def test_its_config_survives_and_says_its_id(row: str) -> None:
    method = spec.build(METHODS, small(row))
    assert method.id == row
    assert spec.build(METHODS, spec.plain(method)) == method


@pytest.mark.parametrize("row", METHODS)
def test_a_round_moves_the_adapter_by_updates_of_the_form_it_says(row: str, base: QuantizedBase) -> None:
    run = simulation(row, base)
    method, start = run.method, run.adapter
    devices = {name: run.engine.tokenize([Example(text=name + TEXT)], 24) for name in ("a", "b")}
    forms: dict[type, tuple[bool, bool]] = {Delta: (True, False), Scalars: (False, True), Split: (True, True)}
    update = run.rules.read(run.payload_of("a", devices["a"]))
    assert forms[type(update)] == (method.deltas, method.directions() is not None)
    spent = run.round(devices)
    assert np.isfinite(run.adapter).all() and not np.array_equal(run.adapter, start)
    assert (run.run.codec is not None) == method.deltas
    assert 0 < spent.bytes_up <= 2 * run.rules.max_bytes()
    assert spent.forwards > 0


def test_devices_in_hybrid_order_and_devices_without_gradients_share_a_run(base: QuantizedBase) -> None:
    forward = {"id": "mezo", "adapter": {"id": "lora_sb", "rank": 4}} | SMALL
    run = simulation("hybrid", base, {"forward_method": forward, "aggregator": {"id": "mean", "weight_by": "variance"}})
    assert run.run.directions is not None and run.run.directions.count == 4
    split = run.rules.read(run.payload_of("a", run.engine.tokenize([Example(text=TEXT)], 24)))
    assert isinstance(split, Split)
    whole = (run.layout.size - 1) / 4
    assert 0 < run.rules.noise(split) < whole


def test_directions_that_differ_do_not_share_a_run(base: QuantizedBase) -> None:
    forward = {"id": "mezo", "adapter": {"id": "lora_sb", "rank": 4}} | SMALL | {"local_steps": 5}
    with pytest.raises(Exception, match="a run has one set"):
        simulation("hybrid", base, {"forward_method": forward})
