"""The benchmark: what is dealt, what is measured, what a report says, and that a killed one goes on where it was."""

from __future__ import annotations

import argparse
import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.data import Example, Message
from experiments import benchmark, benchmark_report, cells, corpora, partitions, survey
from experiments.benchmark_cell import Federation, Named, Setting, measured
from experiments.benchmark_pictures import front
from experiments.cells import Cell
from tests.models import tiny_llama
from wire.errors import UserError

KEYS = [f"client-{n % 7}" for n in range(140)]
HOW = ["natural", "even", "dirichlet-0.3", "sizes-0.3"]


def chance(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A domain whose clients write differently, with questions to answer by yes or no, and another."""
    made = tmp_path / "domains"
    made.mkdir()
    for name, word in (("law", "party"), ("code", "print")):
        lines = [
            {"client": f"c{n % 5}", "instruction": f"{word} {n}?", "output": "yes" if n % 2 else "no"}
            for n in range(90)
        ]
        (made / f"{name}.train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (made / f"{name}.test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:30]))
    return made


def asked(folder: Path, out: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    line = ["--data", str(folder), "--out", str(out), "--domains", "law", "--rounds", "3", "--held-out", "8"]
    return parser.parse_args([*line, "--general", "code", "--questions", "6", *more])


@pytest.mark.parametrize("how", HOW)
def test_every_item_is_dealt_once_and_nobody_is_left_without(how: str) -> None:
    shares = partitions.dealt(how, KEYS, 4, chance())
    assert sorted(i for share in shares for i in share) == list(range(140))
    assert min(map(len, shares)) >= 2
    assert partitions.dealt(how, KEYS, 4, chance()) == shares


def test_partitions_differ_in_what_they_make_uneven() -> None:
    natural, even, mixed, unequal = (partitions.dealt(how, KEYS, 7, chance(1)) for how in HOW)
    assert all(len({KEYS[i] for i in share}) == 1 for share in natural)
    assert {len(share) for share in even} == {20} and min(len({KEYS[i] for i in share}) for share in even) > 4
    assert max(map(len, unequal)) > 2 * 20
    assert max(np.bincount([int(KEYS[i][-1]) for i in share]).max() / len(share) for share in mixed) > 0.5


@pytest.mark.parametrize("named", ["round", "dirichlet", "natural-1", "sizes-x", "sizes-0", "dirichlet-nan"])
def test_an_unknown_partition_is_refused(named: str) -> None:
    with pytest.raises(UserError, match="--partitions"):
        partitions.checked(named)


def test_own_text_is_never_learned_and_questions_have_answers_of_the_same_client(folder: Path) -> None:
    found = corpora.corpus("law", 3, folder)
    shares = corpora.shared_out(found, "natural", 3, 0)
    learned = {e.messages[0].content for share in shares.values() for e in share.train}
    assert not learned & {e.messages[0].content for share in shares.values() for e in share.own}
    assert all(
        question.answers[question.right] == question.example.messages[-1].content for question in found.questions
    )


def test_a_short_answer_is_asked_only_where_there_is_another(folder: Path) -> None:
    asked = [Example(messages=(Message("user", "q"), Message("assistant", a))) for a in ("yes", "no", "yes", "x" * 99)]
    found = corpora._among_others(["a", "a", "b", "b"], asked)
    assert [(q.example.messages[-1].content, q.answers) for q in found] == [
        ("yes", ("no", "yes")),
        ("no", ("no", "yes")),
    ]


def test_a_built_in_domain_is_another_text_than_a_folders_of_its_name(folder: Path) -> None:
    assert list(corpora.digests(["law", "code"], folder)) == ["law", "code"]
    assert corpora.digests(["news"], folder) == corpora.digests(["news"], None) == {"news": corpora.BUILT_IN}
    for part in ("train", "test"):
        (folder / f"law.{part}.jsonl").rename(folder / f"news.{part}.jsonl")
    assert len(corpora.digests(["news"], folder)["news"]) == 64


def test_a_row_names_method_codec_and_engine() -> None:
    for row in ("fedit", "fedit+int8", "mezo@torch", "fedit+int8@toy"):
        assert str(Named.of(row)) == row


def test_a_benchmark_has_baselines_a_report_and_does_no_cell_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert benchmark.run(asked(folder, out, "--methods", "fedit", "--codecs", "float32", "int8", "--jobs", "2")) == 0
    report = json.loads((out / "report.json").read_text())
    base, local, pooled, whole, fedit = report["lines"]
    assert [line["row"] for line in report["lines"]] == [*survey.BASELINES, "fedit+float32", "fedit+int8"]
    assert pooled["loss"] < fedit["loss"] < base["loss"] == base["base_loss"]
    assert pooled["mb"] == local["mb"] == base["mb"] == 0 < fedit["mb"] < whole["mb"] / 3
    assert pooled["gap_closed"] == 1 and 0 < base["accuracy"] <= 1 and base["forgotten"] == 0 != fedit["forgotten"]
    assert fedit["tokens"] > 0 and fedit["peak_mb"] > 10 and fedit["own_worst"] >= fedit["own_loss"] > 0
    page = (out / "report.html").read_text()
    assert "<th>accuracy</th>" in page and "<th>ROUGE-L</th>" not in page  # nothing was generated
    assert page.count("data:image/png;base64,") == 3 and 'src="http' not in page and "<link" not in page
    made = cells.folder(out, Cell("fedit+int8", "law/natural", 0)) / cells.RESULT
    before = made.stat().st_mtime_ns
    assert benchmark.run(asked(folder, out, "--methods", "fedit", "--codecs", "int8")) == 0
    assert made.stat().st_mtime_ns == before
    (folder / "code.test.jsonl").write_text((folder / "law.test.jsonl").read_text())
    with pytest.raises(UserError, match=r"code is not the text that base\.law-natural\.0 has read"):
        benchmark.run(asked(folder, out, "--methods", "fedit", "--codecs", "int4"))


def test_what_generated_answers_score_is_in_every_form_of_the_report(folder: Path, tmp_path: Path) -> None:
    """The domain's answers are yes and no: a tiny model learns to say them, and did not before."""
    model = str(tiny_llama(tmp_path / "model"))
    more = ["--preset", "small", "--model", model, "--devices", "2", "--answers", "6", "--train", "24", "--rounds", "6"]
    settings = json.loads(json.dumps(benchmark._settings(asked(folder, tmp_path, *more))))
    rows = [Cell(row, "law/natural", 0) for row in ("base", "fedit")]
    found = [dataclasses.asdict(row) | measured(row, settings, lambda said: None) | {"machine": {}} for row in rows]
    report = benchmark_report.made(settings, found, 0.8)
    base, fedit = report["lines"]
    assert base["exact"] == base["rouge_l"] == 0
    assert fedit["exact"] > 0 and fedit["rouge_l"] >= fedit["exact"]
    benchmark_report.write(report, tmp_path)
    (head, *_), page = (tmp_path / "report.csv").read_text().splitlines(), (tmp_path / "report.html").read_text()
    assert {"exact", "rouge_l"} <= set(head.split(",")) and "<th>exact match</th><th>ROUGE-L</th>" in page


def test_a_second_stage_goes_on_from_the_first_and_both_are_paid_for(folder: Path, tmp_path: Path) -> None:
    more = ["--preset", "small", "--model", str(tiny_llama(tmp_path / "model")), "--train", "16", "--devices", "2"]
    settings = json.loads(json.dumps(benchmark._settings(asked(folder, tmp_path, *more, "--rounds", "6"))))
    played = Federation(Setting(Cell("slora", "law/natural", 0), settings), ["device-0", "device-1"])
    first = played.simulation
    found = played.played(lambda text: None)
    entries, factors = first.layout.size, played.simulation.layout.size
    assert played.simulation.run.start is not None and entries != factors == found.parameters
    losses = [point["loss"] for point in found.points]
    assert found.points[0]["round"] == 0 and losses[-1] < losses[1] < losses[0]
    assert found.points[-1]["bytes_up"] == pytest.approx(2 * 3 * 4 * (entries + factors), rel=0.01)


def test_what_devices_tune_on_an_emulator_is_measured_on_the_whole_model(folder: Path, tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "model", layers=30)
    line = asked(folder, folder, "--preset", "small", "--model", str(model), "--devices", "2", "--length", "32")
    settings = json.loads(json.dumps(benchmark._settings(line)))
    base, tuned = (measured(Cell(row, "law/natural", 0), settings, lambda said: None) for row in ("base", "fedbiot"))
    assert tuned["points"][0]["loss"] == base["points"][0]["loss"] > tuned["points"][-1]["loss"] + 0.01
    assert tuned["parameters"] < base["parameters"] / 4


def test_a_cell_that_fails_leaves_the_others_and_is_told(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert benchmark.run(asked(folder, out, "--methods", "norm_fit", "fedit")) == 1
    report = json.loads((out / "report.json").read_text())
    assert [line["row"] for line in report["lines"]] == [*survey.BASELINES, "fedit"]


def test_a_benchmark_that_is_killed_goes_on_without_doing_a_cell_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = [sys.executable, "-m", "edgetune", "experiment", "benchmark", "--data", str(folder), "--out", str(out)]
    line += ["--domains", "law", "--methods", "fedit", "--general", "code", "--json"]
    first = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    done = cells.folder(out, Cell("base", "law/natural", 0)) / cells.RESULT
    begun = cells.folder(out, Cell("local", "law/natural", 0)) / "log.txt"
    wait_for(lambda: done.exists() and begun.exists())
    first.send_signal(signal.SIGKILL)
    first.wait()
    wait_for(lambda: not cells_running(out))  # no cell outlives who asked for it
    before = done.stat().st_mtime_ns
    second = subprocess.run(line, capture_output=True, text=True, check=True)
    assert done.stat().st_mtime_ns == before
    assert [found["row"] for found in json.loads(second.stdout)["cells"]] == [*survey.BASELINES, "fedit"]


def cells_running(out: Path) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if "benchmark_cell" in line and str(out) in line:
            found.append(line)
    return found


def wait_for(what: Any, seconds: float = 90.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it took too long"
        time.sleep(0.02)


def cell(row: str, losses: list[float], own: dict[str, float], sent: int = 1_000_000) -> dict[str, Any]:
    points = [
        {
            "round": n, "loss": loss, "forwards": 6 * n, "tokens": 100 * n, "seconds": 2.0 * n, "bytes_up": sent * n,
            "bytes_down": 0,
        }
        for n, loss in enumerate(losses)
    ]  # fmt: skip
    found = {"points": points, "own": own, "accuracy": 0.5, "general": losses[-1], "parameters": 10, "peak_memory": 1e8}
    found |= {"exact": 0.25, "rouge_l": 0.75}
    return {
        "row": row,
        "place": "law/natural",
        "seed": 0,
        "devices": 2,
        "refused": None,
        "errors": [],
        "machine": {},
        "processor_s": 1.0,
    } | found


def test_a_report_reckons_gaps_targets_budgets_and_fairness_from_the_cells() -> None:
    found = [
        cell("base", [4.0], {"a": 4.0, "b": 4.0}, 0),
        cell("local", [4.0, 3.0], {"a": 3.0, "b": 3.5}, 0),
        cell("pooled", [4.0, 2.0], {"a": 2.0, "b": 2.0}, 0),
        cell("fedit", [4.0, 3.0, 2.2], {"a": 3.2, "b": 2.4}),
    ]
    line = benchmark_report.made({}, found, 0.8)["lines"][3]
    assert line["gap_closed"] == pytest.approx(0.8)
    assert line["mb_to_target"] == pytest.approx(1.75) and line["seconds_to_target"] == pytest.approx(3.5)
    assert (line["loss_1mb"], line["loss_10mb"]) == (3.0, 2.2)
    assert (line["own_worst"], line["worse_than_alone"]) == (3.2, 0.5)
    assert line["own_gini"] == pytest.approx(abs(0.8 - 1.6) / (2 * 2.4), abs=1e-4)
    assert line["forgotten"] == pytest.approx(-1.8) and line["bytes_up"] == 500_000
    assert (line["exact"], line["rouge_l"]) == (0.25, 0.75)


def test_where_only_the_baselines_were_played_there_is_a_report_as_well(folder: Path, tmp_path: Path) -> None:
    settings = json.loads(json.dumps(benchmark._settings(asked(folder, tmp_path, "--preset", "tiny"))))
    report = benchmark_report.made(
        settings, [cell("base", [4.0], {"a": 4.0}, 0), cell("local", [4.0, 3.0], {"a": 3.0}, 0)], 0.8
    )
    benchmark_report.write(report, tmp_path)
    assert "data:image/png" in (tmp_path / "report.html").read_text()


def test_a_front_has_what_nothing_beats() -> None:
    assert front([(3, 1.0), (1, 2.0), (2, 2.0), (2, 1.5)]) == [1, 3, 0]


@pytest.mark.parametrize("row", sorted(survey.ALL))
def test_every_row_is_a_run_with_the_small_presets_schedule(row: str, folder: Path) -> None:
    settings = json.loads(json.dumps(benchmark._settings(asked(folder, folder, "--preset", "small"))))
    setting = Setting(Cell(row, "law/natural", 0), settings)
    run = setting.spec(4)
    assert run.rounds == settings["rounds"] and run.cohort.goal == (1 if row == "pooled" else 4)


@pytest.mark.parametrize("row", benchmark.PRESETS["tiny"].methods)
def test_no_row_of_the_first_command_is_refused_and_each_learns(row: str) -> None:
    parser = argparse.ArgumentParser()
    benchmark.add_arguments(parser)
    settings = json.loads(json.dumps(benchmark._settings(parser.parse_args([]))))
    found = measured(Cell(row, "speeches/natural", 0), settings, lambda line: None)
    assert found["refused"] is None and found["points"][-1]["loss"] < found["points"][0]["loss"]


def test_a_rate_of_its_own_is_not_made_faster(folder: Path) -> None:
    settings = json.loads(json.dumps(benchmark._settings(asked(folder, folder))))
    rates = {
        row: Setting(Cell(row, "law/natural", 0), settings).spec(4).method["learning_rate"]
        for row in ("fedit", "sparseloco")
    }
    assert rates == {"fedit": 20 * survey.RATE, "sparseloco": 1e-2}


def test_a_folders_domain_goes_before_a_built_in_one_of_its_name(folder: Path) -> None:
    for half in ("train", "test"):
        (folder / f"law.{half}.jsonl").rename(folder / f"speeches.{half}.jsonl")
    assert corpora.corpus("speeches", 3, folder).train[0].messages[0].content == "party 0?"
    assert corpora.corpus("chat", 3, folder).keys and corpora.corpus("speeches", 3, None).train[0].text


def test_a_codec_that_is_named_goes_both_ways_in_place_of_the_rows(folder: Path) -> None:
    settings = json.loads(json.dumps(benchmark._settings(asked(folder, folder))))
    for codec in ("float32", "int8"):
        flasc, fedit = (
            Setting(Cell(f"{method}+{codec}", "law/natural", 0), settings).spec(4) for method in ("flasc", "fedit")
        )
        assert (flasc.codec, flasc.downlink) == (fedit.codec, fedit.downlink)
        assert (flasc.downlink is None) == (codec == "float32")
    own = Setting(Cell("flasc", "law/natural", 0), settings).spec(4)
    assert own.downlink is not None and own.downlink.decay == 0.0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--engines", "toy", "torch"], "--engines: torch cannot play --model toy alone; choose of toy"),
        (["--preset", "small", "--engines", "split"], "--engines: split cannot play .*; choose of onnx, torch"),
        (["--general", "law"], "'law' is learned itself"),
        (["--general", "empty"], "'empty' has no held-out text"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_played(
    more: list[str], said: str, folder: Path, tmp_path: Path
) -> None:
    (folder / "empty.train.jsonl").write_bytes((folder / "law.train.jsonl").read_bytes())
    (folder / "empty.test.jsonl").write_text("\n")
    with pytest.raises(UserError, match=said):
        benchmark.run(asked(folder, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_what_is_learned_in_one_place_may_tell_what_is_forgotten_in_another(folder: Path, tmp_path: Path) -> None:
    assert len(benchmark._wanted(asked(folder, tmp_path, "--domains", "law", "code", "--general", "law", "code"))) == 18


def test_a_folder_below_a_file_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "afile").write_text("x")
    with pytest.raises(UserError, match="no folder can be made there"):
        benchmark.run(asked(folder, tmp_path / "afile" / "x"))


def test_figures_that_make_no_sense_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--devices must be at least 1"):
        benchmark.run(asked(folder, tmp_path, "--devices", "0"))
    with pytest.raises(UserError, match="--answers must be at least 0"):
        benchmark.run(asked(folder, tmp_path, "--answers", "-1"))
    with pytest.raises(UserError, match="--methods: unknown 'magic'"):
        benchmark.run(asked(folder, tmp_path / "o", "--methods", "magic"))
