"""Public benchmarks: what is asked wrongly is said before a model is loaded; and, with lm-eval installed, a task of one's own."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from experiments import public
from tests.models import tiny_llama
from wire.errors import MissingExtra, UserError

TASK = """\
task: letters
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{asked}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def asked(*line: str | Path) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    public.add_arguments(parser)
    return parser.parse_args([str(word) for word in line])


def test_without_lm_eval_the_extra_that_brings_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"lm_eval is not installed: pip install 'edgetune\[public\]'"):
        public.run(asked(tmp_path, "--tasks", "arc_easy"))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model here"):
        public.loader(tmp_path)


@pytest.mark.parametrize("made", ["adapter_config.json", "adapter.safetensors", "config.json"])
def test_a_folder_is_loaded_as_the_export_that_it_is(made: str, tmp_path: Path) -> None:
    (tmp_path / made).touch()
    assert public.loader(tmp_path) is public.KINDS[made]


def test_every_figure_of_every_task_is_a_line() -> None:
    found = {
        "results": {
            "arc": {"alias": "arc", "acc,none": 0.25, "acc_stderr,none": 0.1, "acc_norm,none": 0.5, "acc_norm_stderr,none": 0.2},
            "gsm": {"alias": "gsm", "exact_match,strict-match": 0.0, "exact_match_stderr,strict-match": "N/A"},
        },
        "n-samples": {"arc": {"original": 9, "effective": 4}},
    }  # fmt: skip
    lines = [tuple(line.values()) for line in public.lines("mine", found)]
    assert lines == [
        ("arc", "acc", "none", "mine", 0.25, 0.1, 4),
        ("arc", "acc_norm", "none", "mine", 0.5, 0.2, 4),
        ("gsm", "exact_match", "strict-match", "mine", 0.0, None, None),
    ]


def test_a_task_of_ones_own_is_measured_and_an_unknown_one_refused(tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("lm_eval")
    tasks, model = tmp_path / "tasks", tiny_llama(tmp_path / "model")
    tasks.mkdir()
    rows = [{"asked": f"{n} is", "choices": ["odd", "even"], "answer": (n + 1) % 2} for n in range(8)]
    (tasks / "letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tasks / "letters.yaml").write_text(TASK.format(file=tasks / "letters.jsonl"))
    line: list[str | Path] = [model, "--include", tasks, "--out", tmp_path / "out", "--json"]
    assert public.run(asked(*line, "--tasks", "letters", "--limit", "6")) == 0
    (figure,) = json.loads(capsys.readouterr().out)["lines"]
    assert (figure["task"], figure["metric"], figure["questions"]) == ("letters", "acc", 6)
    assert 0 <= figure["value"] <= 1 and "letters" in (tmp_path / "out" / "report.html").read_text()
    with pytest.raises(UserError, match="lm-eval has no 'nonesuch'"):
        public.run(asked(*line, "--tasks", "nonesuch"))


def test_every_benchmark_is_one_that_lm_eval_has() -> None:
    pytest.importorskip("lm_eval")
    public._manager([name for names in public.BENCHMARKS.values() for name in names], None)
