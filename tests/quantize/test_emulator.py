"""Emulators compute what the whole model would without the layers left out, and what is tuned on one goes onto the other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from edge_client.adapters.low_rank import LoraFactors
from edge_client.engines import Tokens
from edge_client.engines.torch_engine import TorchEngine
from edge_client.export import to_merged
from edgetune.runs import _onto
from quantize import QuantizedBase, QuantizeError, open_base
from quantize.base_model import build
from quantize.emulator import parse
from tests.models import tiny_llama
from tests.processes import edgetune
from wire.errors import UserError

KEPT = (0, 3, 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny_llama(tmp_path_factory.mktemp("emulator") / "model", layers=5)


@pytest.fixture(scope="module")
def emulator(model: Path) -> QuantizedBase:
    return build(str(model), "bf16", model.parent / "emulator", keep=KEPT)


def text() -> list[Tokens]:
    ids = np.random.Generator(np.random.Philox(key=5)).integers(0, 255, (3, 24)).astype(np.int32)
    return [Tokens(row, row.copy()) for row in ids]


def loss_of(folder: Path, keep: tuple[int, ...] | None = None) -> float:
    """Nats a token in plain transformers, with the layers `keep` alone."""
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if keep is not None:
        plain.model.layers = nn.ModuleList(plain.model.layers[n] for n in keep)
    ids = torch.tensor(np.stack([tokens.ids for tokens in text()]).astype(np.int64))
    with torch.no_grad():
        return float(plain(input_ids=ids, labels=ids, use_cache=False).loss)


def test_an_emulator_is_the_model_without_the_layers_left_out(model: Path, emulator: QuantizedBase) -> None:
    adapter = LoraFactors(rank=2)
    total, count = TorchEngine.load(emulator, adapter, adapter.layout(emulator)).loss(text())
    assert total / count == pytest.approx(loss_of(model, KEPT), abs=0.01)
    assert emulator.kept_layers == KEPT and len(emulator.linears()) == 7 * 3
    assert emulator.bytes_on_disk < 0.75 * build(str(model), "bf16", model.parent / "again").bytes_on_disk


def test_an_emulator_of_an_exported_emulator_still_knows_the_first_models_layers(emulator: QuantizedBase) -> None:
    adapter, out = LoraFactors(rank=2), emulator.folder.parent
    layout = adapter.layout(emulator)
    to_merged(emulator, adapter.placement(emulator), layout, adapter.initial(layout, 1), out / "aligned")
    assert build(str(out / "aligned"), "nf4", out / "second", keep=(0, 2)).kept_layers == (0, 4)


def test_what_is_tuned_on_an_emulators_last_layers_goes_onto_the_whole_model(
    model: Path, emulator: QuantizedBase
) -> None:
    whole = build(str(model), "bf16", model.parent / "whole")
    row = LoraFactors(rank=2, layers=2)
    vector = np.random.default_rng(1).normal(0, 0.1, row.layout(emulator).size).astype(np.float32)
    base, layout = _onto(emulator, row, row.layout(emulator), whole.folder)
    assert isinstance(base, QuantizedBase) and layout == row.layout(whole)
    to_merged(base, row.placement(base), layout, vector, model.parent / "merged")
    engine = TorchEngine.load(whole, row, layout)
    engine.write(vector)
    total, count = engine.loss(text())
    assert loss_of(model.parent / "merged") == pytest.approx(total / count, abs=1e-3)
    with pytest.raises(UserError, match="tune the last"):
        _onto(emulator, LoraFactors(rank=2), LoraFactors(rank=2).layout(emulator), whole.folder)
    with pytest.raises(UserError, match="no emulator"):
        _onto(whole, row, layout, whole.folder)


@pytest.mark.parametrize("said", ["", "a", "3,2", "1-", "0,0", "5-3"])
def test_layers_that_make_no_sense_are_refused(said: str) -> None:
    with pytest.raises(QuantizeError, match="--keep-layers"):
        parse(said)


def test_the_command_makes_one_and_says_which_layers_there_are(model: Path, tmp_path: Path) -> None:
    done = edgetune("quantize", model, "--format", "int8", "--keep-layers", "0,3-4", "--out", tmp_path / "e", "--json")
    assert done.returncode == 0 and open_base(tmp_path / "e").identity == json.loads(done.stdout)["identity"]
    assert open_base(tmp_path / "e").kept_layers == KEPT
    refused = edgetune("quantize", model, "--keep-layers", "0,9", "--out", tmp_path / "f")
    assert refused.returncode == 2 and "0 to 4" in refused.stderr
