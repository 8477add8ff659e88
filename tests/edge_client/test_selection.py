"""A coreset: features against transformers' own pass, groups against brute force, and a federation that trains on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from edge_client import export, selection
from edge_client.adapters.low_rank import LoraFactors
from edge_client.data import Example
from edge_client.engines import Tokens
from edge_client.engines.onnx_engine import OnnxEngine
from edge_client.engines.torch_engine import TorchEngine
from edge_client.engines.toy import ToyBase, ToyEngine
from edge_client.session import Device, Session
from quantize import QuantizedBase
from quantize.base_model import build
from tests.edge_client.test_torch_engine import batch
from tests.experiments.test_portions import federation
from tests.models import tiny_llama
from wire import run_spec
from wire.delta import Vector
from wire.run_spec import Selection

ROW = LoraFactors(rank=2)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> QuantizedBase:
    folder = tmp_path_factory.mktemp("models")
    torch.set_num_threads(1)
    return build(str(tiny_llama(folder / "model", layers=3)), "int4-onnx", folder / "q")


def loaded(kind: Any, base: QuantizedBase) -> Any:
    layout = ROW.layout(base)
    engine = kind.load(base, ROW, layout)
    engine.write(ROW.initial(layout, 0, base))
    return engine


def test_features_are_the_means_of_every_layers_hidden_states(base: QuantizedBase, tmp_path: Path) -> None:
    layout, text = ROW.layout(base), batch()
    export.to_merged(base, ROW.placement(base), layout, ROW.initial(layout, 0, base), tmp_path / "plain")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    found = loaded(TorchEngine, base).features(text)
    assert found.dtype == np.float32 and found.shape == (4, 4 * 128)
    for sequence, row in zip(text, found, strict=True):
        with torch.no_grad():
            states = model(torch.tensor(sequence.ids[None]).long(), output_hidden_states=True).hidden_states
        means = [state[0].double().numpy().mean(axis=0) for state in states]
        wanted = np.concatenate([mean / np.sqrt((mean**2).sum()) for mean in means])
        assert np.allclose(row, wanted, atol=1e-4)


def test_without_gradients_a_device_has_the_same_features(base: QuantizedBase) -> None:
    text = batch()
    assert np.allclose(loaded(OnnxEngine, base).features(text), loaded(TorchEngine, base).features(text), atol=2e-3)


def blobs(count: int, each: int, spread: float) -> Vector:
    chance = np.random.default_rng(7)
    middles = chance.normal(size=(count, 300))
    return np.concatenate([m + spread * chance.normal(size=(each, 300)) for m in middles]).astype(np.float32)


def test_distances_along_principal_components_are_those_of_the_best_plane() -> None:
    features = blobs(5, 12, 0.05)
    centred = features.astype(np.float64) - features.mean(axis=0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    wanted = left[:, :4] * values[:4]
    found = selection.reduced(features, 4)

    def distances(points: Any) -> Any:
        return np.linalg.norm(points[:, None] - points[None], axis=2)

    assert np.allclose(distances(found), distances(wanted), atol=1e-3 * values[0])


def test_of_groups_that_lie_apart_the_one_in_each_middle_is_chosen() -> None:
    features = blobs(6, 20, 0.02)
    chosen = selection.coreset(features, 6)
    assert [number // 20 for number in chosen] == list(range(6))
    points = selection.reduced(features, selection.DIMENSIONS)
    for group, number in enumerate(chosen):
        mine = points[20 * group : 20 * group + 20]
        away = [sum((p - m) ** 2 for p, m in zip(point, mine.mean(axis=0), strict=True)) for point in mine]
        assert number == 20 * group + int(np.argmin(away))


def test_groups_are_at_rest_and_the_same_every_time() -> None:
    points = np.random.default_rng(2).normal(size=(200, 3)).astype(np.float32)
    labels = selection.grouped(points, 9)
    means = {n: points[labels == n].mean(axis=0) for n in set(labels.tolist())}
    assert len(means) == 9
    for point, label in zip(points, labels, strict=True):
        assert min(means, key=lambda n: float(((point - means[n]) ** 2).sum())) == label
    assert np.array_equal(selection.grouped(points, 9), labels)


def test_of_text_that_is_all_alike_one_sequence_is_enough() -> None:
    assert selection.coreset(np.ones((7, 40), np.float32), 4) == [0]
    assert selection.coreset(np.ones((1, 40), np.float32), 1) == [0]


KINDS = ["abcd", "efgh", "ijkl", "mnop"]
REPEATED = [Example((kind * 9)[shift : shift + 31]) for shift in range(4) for kind in KINDS]


def text(simulation: Any, examples: list[Example]) -> list[Tokens]:
    found: list[Tokens] = simulation.engine.tokenize(examples, 32)
    return found


def test_a_federation_learns_all_kinds_of_text_from_one_sequence_of_each() -> None:
    simulation = federation(selection={"share": 0.25})
    devices = {d: text(simulation, REPEATED) for d in ("a", "b")}

    def loss() -> float:
        simulation.engine.write(simulation.adapter)
        total, targets = simulation.engine.loss(devices["a"])
        return float(total / targets)

    before = loss()
    sent = [simulation.sent(device, train) for device, train in devices.items()]
    assert [one.examples for one in sent] == [4, 4]
    kinds = {bytes(sorted(set(s.ids.tolist()) - {0})) for s in simulation._learned["a"]}
    assert kinds == {kind.encode() for kind in KINDS}
    simulation.publish(sent)
    for _ in range(5):
        simulation.round(devices)
    assert loss() < before - 1


def work(examples: list[Example], **changes: Any) -> Any:
    method = {"id": "lora", "rank": 4, "sequence_length": 32}
    table = {
        "name": "r",
        "base": {"model": "toy", "format": "toy"},
        "rounds": 1,
        "cohort": {"goal": 1},
        "method": method,
    }
    run = run_spec.parse(table | changes)
    return Session(Device(Path("x")), examples).work(run, LoraFactors(rank=4).layout(ToyBase()))


def test_a_device_trains_on_what_it_chose_counts_that_and_holds_out_as_before() -> None:
    whole, part = work(REPEATED), work(REPEATED, selection={"share": 0.25})
    assert (len(part.train), part.examples) == (4, 4) and len(whole.train) == 13 == whole.examples
    assert {s.ids.tobytes() for s in part.train} <= {s.ids.tobytes() for s in whole.train}
    assert [s.ids.tobytes() for s in part.held_out] == [s.ids.tobytes() for s in whole.held_out]


def test_a_share_of_all_leaves_no_kind_of_text_out() -> None:
    engine = ToyEngine.load(ToyBase(), ROW, ROW.layout(ToyBase()))
    train, initial = engine.tokenize(REPEATED, 32), ROW.initial(engine.layout, 0)
    everything = selection.selected(engine, initial, train, Selection(1.0))
    distinct = {np.bincount(s.ids, minlength=256).tobytes() for s in train}
    assert {np.bincount(s.ids, minlength=256).tobytes() for s in everything} == distinct
    assert selection.selected(engine, initial, train, None) == train
