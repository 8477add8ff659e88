"""`edgetune experiment codecs`: the table that the codec is judged by."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from edge_client import recording
from edgetune import cli
from experiments import codecs, recorded
from experiments.rate_distortion import bound
from quantize import tensors
from wire.codecs import chain
from wire.codecs.compositions import INT4
from wire.delta import Delta, Layout, Tensor
from wire.errors import UserError
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
def deltas(tmp_path: Path) -> Path:
    for device in range(2):
        recording.write(tmp_path, normal(device), TASK, f"d{device}")
    return tmp_path


def normal(seed: int, layout: Layout = LAYOUT) -> Delta:
    entries = np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32)
    return Delta(layout, entries * np.float32(0.01))


def command(*words: str | Path) -> int:
    return cli.main(["experiment", "codecs", *map(str, words)])


def strict(text: str) -> list[dict[str, float | None]]:
    """The objects of some lines; NaN and Infinity are no JSON."""
    return [json.loads(line, parse_constant=lambda word: pytest.fail(word)) for line in text.splitlines()]


def test_the_bound_is_that_of_water_filling() -> None:
    two = np.array([4.0, 1.0]), np.array([10.0, 10.0])
    assert bound(np.array([1.0]), np.array([3.0]), 1 / 16) == pytest.approx(2.0)
    assert bound(*two, 0.1) == pytest.approx(np.log2(4 / 0.25) / 4 + np.log2(1 / 0.25) / 4)
    assert bound(*two, 0.6) == pytest.approx(np.log2(4 / 2) / 4)  # the level, 2, is above the second variance
    assert bound(*two, 1.0) == 0.0


def test_recorded_deltas_are_read_back_with_their_roles_and_in_their_groups(deltas: Path) -> None:
    (group,) = recorded.grouped(sorted(deltas.iterdir()))
    assert group.devices == ("d0", "d1") and [delta.layout for delta in group.deltas] == [LAYOUT, LAYOUT]
    for seed, delta in enumerate(group.deltas):
        np.testing.assert_array_equal(delta.vector, normal(seed).vector)


def test_a_point_has_what_was_sent_and_what_was_lost(deltas: Path) -> None:
    groups = recorded.grouped(sorted(deltas.iterdir()))
    point = codecs.measured("int4", chain.codec([INT4, codecs.PACK]), groups)
    assert point.bits_per_param == pytest.approx(4.25 + 8 * chain.HEADER_BYTES / LAYOUT.size, abs=0.01)
    errors = [np.square(d.vector - _through(d)).sum() / np.square(d.vector).sum() for d in groups[0].deltas]
    assert point.relative_mse == pytest.approx(np.mean(errors), rel=1e-3)
    mean, arrived = (np.mean([f(d) for d in groups[0].deltas], axis=0) for f in (lambda d: d.vector, _through))
    assert point.aggregate_mse == pytest.approx(np.square(arrived - mean).sum() / np.square(mean).sum(), rel=1e-2)
    assert point.encode_mparam_s > 0 and point.decode_mparam_s > 0


def _through(delta: Delta) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    codec = chain.codec([INT4, codecs.PACK])
    return codec.decode(codec.encode(delta, {})[0], delta.layout).vector


def test_the_command_prints_an_object_a_point_and_draws(deltas: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = deltas / "codecs.svg"
    line = ["experiment", "codecs", str(deltas), "--rows", "ecsq,int8", "--rates", "1,3", "--json"]
    assert cli.main([*line, "--plot", str(picture)]) == 0
    points = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert [p["row"] for p in points] == ["ecsq", "ecsq", "int8"]
    assert set(points[0]) == {field.name for field in dataclasses.fields(codecs.Point)}
    assert picture.read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--rows", "gzip"], "unknown row 'gzip'"),
        (["--rows", ""], "unknown row ''"),
        (["--rates", "many"], "expected numbers"),
        (["--rates", ""], "expected numbers"),
        (["--rates", "0.2,99"], "target_bits"),
        (["--plot", "nofolder/p.png"], "nofolder is no folder"),
        (["--plot", "p.xyz"], "ends in .png or .svg"),
        (["--plot", "."], "ends in .png or .svg"),
        (["--plot", ".png"], "ends in .png or .svg"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    deltas: Path, wrong: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(deltas)
    monkeypatch.setattr(codecs, "measured", lambda *_: pytest.fail("measured before it was refused"))
    assert command(deltas, *wrong) == 2
    assert said in capsys.readouterr().err
    assert {path.suffix for path in deltas.iterdir()} == {".safetensors"}


def test_an_update_that_arrives_exactly_has_no_gap_and_no_place_in_the_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = Delta(LAYOUT, (np.arange(LAYOUT.size) % 7 - 3).astype(np.float32))
    recording.write(tmp_path, whole, TASK, "d0")
    assert command(tmp_path, "--rows", "float16,int4", "--json", "--plot", tmp_path / "p.svg") == 0
    exact, coded = strict(capsys.readouterr().out)
    assert exact["gap_bits"] is None and exact["relative_mse"] == 0
    assert coded["gap_bits"] is not None and coded["gap_bits"] > 0
    drawn = (tmp_path / "p.svg").read_text()
    assert "<!-- int4 -->" in drawn and "<!-- float16 -->" not in drawn
    assert command(tmp_path, "--rows", "float16", "--plot", tmp_path / "none.svg") == 0
    told = capsys.readouterr()
    assert "gap exact" in told.out and "no picture" in told.err and not (tmp_path / "none.svg").exists()


def test_one_update_that_arrives_exactly_leaves_the_other_means_as_they_are(
    deltas: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recording.write(deltas, Delta(LAYOUT, np.ones(LAYOUT.size, np.float32)), TASK, "whole")
    assert command(deltas, "--rows", "float16,int4", "--json") == 0
    half, coded = strict(capsys.readouterr().out)
    assert half["gap_bits"] is None and coded["gap_bits"] is not None


def test_rows_beyond_the_usual_picture_have_one_of_their_own(deltas: Path) -> None:
    assert command(deltas, "--rows", "int8", "--plot", deltas / "p.svg") == 0
    assert "<!-- int8 -->" in (deltas / "p.svg").read_text()


def written(path: Path, **some: object) -> Path:
    """A safetensors file of some arrays, float32 or as they are."""
    arrays = {name.replace("_", "."): np.asarray(value) for name, value in some.items()}
    kinds = {"f": "F32", "i": "I32"}
    tensors.write(path, {n: (kinds[a.dtype.kind], a.shape) for n, a in arrays.items()}, arrays.values())
    return path


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({}, "no tensors in it"),
        ({"q": np.zeros((2, 3), np.float32)}, "all entries are zero"),
        ({"q": np.ones(3, np.float32), "v": np.array([1, np.nan], np.float32)}, "tensor 'v' has an entry"),
        ({"q": np.array([np.inf], np.float32)}, "tensor 'q' has an entry"),
        ({"q": np.float32(1)}, "tensor 'q' has the shape []"),
        ({"q": np.ones((2, 0), np.float32), "v": np.ones(3, np.float32)}, "tensor 'q' has the shape [2, 0]"),
        ({"q": np.ones(3, np.int32)}, "tensor 'q' is of I32"),
    ],
)
def test_a_file_that_is_no_delta_is_refused_by_its_name_and_the_tensors(
    tmp_path: Path, entries: dict[str, object], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(tmp_path / "wrong.safetensors", **entries)
    assert command(path, "--rows", "int4") == 2
    told = capsys.readouterr().err
    assert str(path) in told and said in told and "Traceback" not in told


def test_runs_of_one_name_are_one_group_only_from_one_release_by_one_spec(
    deltas: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, changed in enumerate(({"release_digest": "1" * 64}, {"spec_digest": "2" * 64}, {"round": 2})):
        recording.prepare(deltas / str(number))
        recording.write(deltas / str(number), normal(3), dataclasses.replace(TASK, **changed), "d0")  # type: ignore[arg-type]
    groups = recorded.grouped(recorded.found([deltas]))
    assert sorted(group.devices for group in groups) == [("d0",), ("d0",), ("d0",), ("d0", "d1")]
    assert command(deltas, "--rows", "sign") == 0
    said = capsys.readouterr().err
    assert "run speeches, round 1, from release 00000000, spec 00000000: d0, d1" in said
    assert "run speeches, round 1, from release 11111111, spec 00000000: d0\n" in said


def test_files_that_do_not_say_whose_they_are_are_measured_alone(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        written(tmp_path / folder / "same.safetensors", q=normal(1).vector)
    assert len(recorded.grouped(recorded.found([tmp_path, tmp_path / "a"]))) == 2


@pytest.mark.parametrize(
    ("delta", "device", "said"),
    [
        (normal(0), "d0", "the second delta of device d0"),
        (normal(0, Layout(LAYOUT.tensors[:2])), "d2", "have different tensors"),
    ],
)
def test_a_group_that_no_coordinator_would_have_combined_is_refused(
    deltas: Path, delta: Delta, device: str, said: str
) -> None:
    recording.prepare(deltas / "more")
    recording.write(deltas / "more", delta, TASK, device)
    with pytest.raises(UserError, match=said):
        recorded.grouped(recorded.found([deltas]))


def test_deltas_whose_mean_is_nothing_are_refused(tmp_path: Path) -> None:
    for device, sign in (("for", 1), ("against", -1)):
        recording.write(tmp_path, Delta(LAYOUT, np.float32(sign) * normal(0).vector), TASK, device)
    with pytest.raises(UserError, match="the deltas of against, for cancel out"):
        recorded.grouped(recorded.found([tmp_path]))


def test_every_row_of_the_ladder_is_a_codec_of_the_tables() -> None:
    for row, several in codecs.ladder(codecs.RATES).items():
        assert several and all(chain.codec(stages).digest for stages in several), row
