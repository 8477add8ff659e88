"""`edgetune experiment codecs`: the table that the codec is judged by."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from edge_client import recording
from edgetune import cli
from experiments import codecs
from experiments.rate_distortion import bound
from wire.codecs import chain
from wire.codecs.compositions import INT4
from wire.delta import Delta, Layout, Tensor
from wire.messages import Task

LAYOUT = Layout(
    (Tensor("q.lora_A.weight", (8, 600), "lora_A"), Tensor("q.lora_B.weight", (500, 8), "lora_B"), Tensor("n", (64,)))
)
TASK = Task(
    run="speeches",
    round=1,
    attempt=1,
    kind="train",
    release_version=0,
    release_digest="0" * 64,
    spec_digest="0" * 64,
    layout_digest=LAYOUT.digest,
    deadline_s=0.0,
)


@pytest.fixture
def recorded(tmp_path: Path) -> Path:
    for device in range(2):
        chance = np.random.default_rng(device)
        delta = Delta(LAYOUT, chance.standard_normal(LAYOUT.size).astype(np.float32) * np.float32(0.01))
        recording.write(tmp_path, delta, TASK, f"d{device}")
    return tmp_path


def test_the_bound_is_that_of_water_filling() -> None:
    two = np.array([4.0, 1.0]), np.array([10.0, 10.0])
    assert bound(np.array([1.0]), np.array([3.0]), 1 / 16) == pytest.approx(2.0)
    assert bound(*two, 0.1) == pytest.approx(np.log2(4 / 0.25) / 4 + np.log2(1 / 0.25) / 4)
    assert bound(*two, 0.6) == pytest.approx(np.log2(4 / 2) / 4)  # the level, 2, is above the second variance
    assert bound(*two, 1.0) == 0.0


def test_recorded_deltas_are_read_back_with_their_roles_and_in_their_groups(recorded: Path) -> None:
    (group,) = codecs.grouped(sorted(recorded.iterdir()))
    assert [delta.layout for delta in group] == [LAYOUT, LAYOUT]
    assert not np.array_equal(group[0].vector, group[1].vector)


def test_a_point_has_what_was_sent_and_what_was_lost(recorded: Path) -> None:
    groups = codecs.grouped(sorted(recorded.iterdir()))
    point = codecs.measured("int4", chain.codec([INT4, codecs.PACK]), groups)
    assert point.bits_per_param == pytest.approx(4.25 + 8 * chain.HEADER_BYTES / LAYOUT.size, abs=0.01)
    errors = [np.square(d.vector - _through(d)).sum() / np.square(d.vector).sum() for d in groups[0]]
    assert point.relative_mse == pytest.approx(np.mean(errors), rel=1e-3)
    mean, arrived = (np.mean([f(d) for d in groups[0]], axis=0) for f in (lambda d: d.vector, _through))
    assert point.aggregate_mse == pytest.approx(np.square(arrived - mean).sum() / np.square(mean).sum(), rel=1e-2)
    assert point.encode_mparam_s > 0 and point.decode_mparam_s > 0


def _through(delta: Delta) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    codec = chain.codec([INT4, codecs.PACK])
    return codec.decode(codec.encode(delta, {})[0], delta.layout).vector


def test_the_command_prints_an_object_a_point_and_draws(recorded: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = recorded / "codecs.svg"
    line = ["experiment", "codecs", str(recorded), "--rows", "ecsq,int8", "--rates", "1,3", "--json"]
    assert cli.main([*line, "--plot", str(picture)]) == 0
    points = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [p["row"] for p in points] == ["ecsq", "ecsq", "int8"]
    assert set(points[0]) == {field.name for field in dataclasses.fields(codecs.Point)}
    assert picture.read_text().startswith("<?xml")


@pytest.mark.parametrize("wrong", [["--rows", "gzip"], ["--rates", "many"]])
def test_what_is_not_there_is_refused_by_name(recorded: Path, wrong: list[str]) -> None:
    assert cli.main(["experiment", "codecs", str(recorded), *wrong]) == 2


def test_every_row_of_the_ladder_is_a_codec_of_the_tables() -> None:
    for row, several in codecs.ladder(codecs.RATES).items():
        assert several and all(chain.codec(stages).digest for stages in several), row
