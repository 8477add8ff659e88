"""docs/methods.md says what the code does: rows tune beside a quantized base, mix ranks and do without gradients as it says."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.data import Example
from edge_client.engines.torch_engine import TorchEngine
from edge_client.session import settled
from experiments import method_table, survey
from experiments.simulation import Simulation
from quantize.base_model import build
from tests.models import tiny_llama
from wire import run_spec, spec

ROOT = Path(__file__).parents[2]
SCHEDULE = {"local_steps": 2, "batch": 2, "sequence_length": 24}
TEXT = [Example("the cat sat on the mat. " * 6), Example("a dog ran in the park. " * 6)]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Ten layers, quantized to 4 bits."""
    folder = tmp_path_factory.mktemp("table")
    return build(str(tiny_llama(folder / "model", layers=10)), "nf4", folder / "nf4")


def simulation(base: Any, row: survey.Row, ranks: dict[str, int], **changes: Any) -> Simulation:
    method = row.method | SCHEDULE
    table = {
        "name": "t",
        "base": {"model": "tiny", "format": "nf4"},
        "rounds": 4,
        "cohort": {"goal": 2},
        "method": method,
    }
    run = run_spec.parse(table | {"codec": "float32"} | row.run | changes)
    return Simulation(run, base, TorchEngine, 1, None, ranks)


def files(base: Any) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(base.folder.iterdir())}


def played(found: Simulation) -> float:
    """How far two rounds of two devices have led from the first release; every device's own adapter counts."""
    devices = {"a": found.engine.tokenize(TEXT[:1], 24), "b": found.engine.tokenize(TEXT[1:], 24)}
    before = {name: found.adapter_of(name).copy() for name in devices}
    for _ in range(2):
        found.round(devices)
    moved = [np.abs(found.adapter_of(name) - start).max() for name, start in before.items()]
    assert np.isfinite(moved).all()
    return float(min(moved))


def test_the_page_is_what_the_rows_say() -> None:
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == method_table.page(), "run 'make docs'"


@pytest.mark.parametrize("name", sorted(survey.SURVEY))
def test_every_row_is_tested_where_it_says(name: str) -> None:
    assert (ROOT / survey.SURVEY[name].tested).is_file()


@pytest.mark.parametrize("name", sorted(survey.SURVEY))
def test_every_row_tunes_beside_a_quantized_base_and_leaves_it_as_it_is(name: str, base: Any) -> None:
    row = survey.SURVEY[name]
    before = files(base)
    ranks = dict(zip("ab", row.ranks, strict=False))
    assert played(simulation(base, row, ranks)) > 0
    assert files(base) == before


@pytest.mark.parametrize("name", sorted(survey.SURVEY))
def test_ranks_are_mixed_where_the_table_says_so(name: str, base: Any) -> None:
    row = survey.SURVEY[name]
    if not method_table.mixes_ranks(row, method_table.Shapes()):
        pytest.skip("the table says no")
    found = simulation(base, row, {"a": 2}, portions={"id": "tuned", "least_rank": 1})
    assert found.adapter_of("a").size < found.adapter_of("b").size
    assert played(found) > 0


@pytest.mark.parametrize("name", sorted(survey.SURVEY))
def test_losses_alone_tune_it_where_the_table_says_so(name: str, base: Any) -> None:
    run, adapter = settled(method_table.run_of(survey.SURVEY[name]), base)
    if not method_table.takes_losses(adapter, base):
        pytest.skip("the table says no")
    method = {"id": "mezo", "adapter": spec.plain(adapter), "learning_rate": 1e-3}
    assert run.base.model and played(simulation(base, survey.Row("x", "", method), {})) > 0


def test_a_row_without_a_codec_sends_multiples_and_any_other_a_delta() -> None:
    shapes = method_table.Shapes()
    for name in ("fedit", "mezo", "hybrid"):
        found = method_table.facts(survey.SURVEY[name], shapes)
        assert found.codec == (name != "mezo") and ("multiples" in found.travels) == (name != "fedit")


def test_bytes_follow_the_formulas() -> None:
    shapes = method_table.Shapes()
    fedit, mezo, kseed, fwdllm = (
        method_table.facts(survey.SURVEY[name], shapes) for name in ("fedit", "mezo", "kseed", "fwdllm")
    )
    assert 0 <= fedit.bytes_up - 4 * fedit.numbers < 64
    assert (mezo.bytes_up, kseed.bytes_up) == (23 + 2 * mezo.numbers, 23 + 4 * kseed.numbers)
    assert fedit.numbers == 2_442_240 and kseed.numbers == fwdllm.numbers == 10
    assert fwdllm.bytes_up == 23 + 4 * fwdllm.numbers
