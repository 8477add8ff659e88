"""`edgetune experiment public`: models that were taken home, on the survey's public benchmarks, by the lm-eval harness."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import cells, pages
from wire.errors import MachineError, MissingExtra, UserError
from wire.spec import Plain

BENCHMARKS: Mapping[str, tuple[str, ...]] = {
    "general": ("arc_easy", "hellaswag", "winogrande", "piqa"),
    "medicine": ("medmcqa", "medqa_4options", "pubmedqa", "mmlu_clinical_knowledge"),
    "finance": ("mmlu_professional_accounting", "mmlu_econometrics"),
    "law": ("mmlu_professional_law", "mmlu_international_law", "mmlu_jurisprudence"),
    "math": ("gsm8k", "asdiv"),
    "code": ("mmlu_high_school_computer_science", "mmlu_college_computer_science"),
}
"""Domain of the survey -> lm-eval's names. Those that run what a model wrote (HumanEval, MBPP) are left out."""
EXAMPLES = f"""\
examples:
  edgetune run export speeches --to peft ./mine
  edgetune experiment public ./mine ./mine/base --tasks arc_easy hellaswag --limit 200     tuned, and as it was before
  edgetune experiment public ./mine --tasks medicine math --chat
  edgetune experiment public ./mine --tasks ours --include ./tasks                          lm-eval's YAML files of your own

A domain stands for its tasks:
{chr(10).join(f"  {domain:<9} {', '.join(names)}" for domain, names in BENCHMARKS.items())}

lm-eval fetches a task's data from the hub when it is first asked for.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="what `export` wrote, or a model's folder")
    parser.add_argument("--tasks", nargs="+", required=True, metavar="TASK", help="domains, or lm-eval's names")
    parser.add_argument("--include", type=Path, metavar="DIR", help="a folder of more tasks, lm-eval's YAML files")
    parser.add_argument("--limit", type=int, metavar="N", help="questions of each task; default: all")
    parser.add_argument("--shots", type=int, metavar="N", help="examples before each question; default: the task's own")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument("--chat", action="store_true", help="ask through the model's chat template")
    parser.add_argument("--out", type=Path, default=Path("public-out"), metavar="DIR", help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="the report on standard output")


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingExtra("lm_eval", "public")
    loaders = [loader(folder) for folder in args.folders]
    names = [name for task in args.tasks for name in BENCHMARKS.get(task, (task,))]
    manager = _manager(names, args.include)
    found = [
        _measured(load(folder), folder, names, manager, args)
        for load, folder in zip(loaders, args.folders, strict=True)
    ]
    settings = {"tasks": names, "limit": args.limit, "shots": args.shots, "chat": args.chat}
    report: Plain = {
        "settings": settings,
        "lines": [line for lines in found for line in lines],
        "machine": cells.machine(),
    }
    _write(report, args.out)
    print(json.dumps(report) if args.json else "\n".join(map(shown, report["lines"])))
    return 0


def loader(folder: Path) -> Callable[[Path], Any]:
    """What makes a causal model of a folder. Raises UserError for one that is no model's."""
    for mark, load in KINDS.items():
        if (folder / mark).exists():
            return load
    raise UserError(f"{folder}: no model here (none of {', '.join(KINDS)}); give what `edgetune run export` wrote")


def _plain(folder: Path) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def _adapted(folder: Path) -> Any:
    import peft

    return peft.PeftModel.from_pretrained(_plain(folder / "base"), folder)


def _own(folder: Path) -> Any:
    from edge_client import taken_home

    return taken_home.model(folder)


KINDS: Mapping[str, Callable[[Path], Any]] = {
    "adapter_config.json": _adapted,
    "adapter.safetensors": _own,
    "config.json": _plain,
}
"""A file that a folder has -> how it is loaded; the first that is there."""


def _manager(names: Sequence[str], include: Path | None) -> Any:
    """lm-eval's table of tasks. Raises UserError for a name that is not in it."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=None if include is None else str(include))
    for name in names:
        if name not in manager.task_index:
            raise UserError(f"--tasks: lm-eval has no {name!r}; `lm-eval ls tasks` shows what it has")
    return manager


def _measured(model: Any, folder: Path, names: list[str], manager: Any, args: argparse.Namespace) -> list[Plain]:
    """The lines of one model. Raises MachineError where a task's data cannot be had."""
    import lm_eval
    import transformers
    from lm_eval.models.huggingface import HFLM

    from edge_client.engines.torch_engine import best_device

    beside = folder / "base" if (folder / "base").exists() else folder
    tokenizer = transformers.AutoTokenizer.from_pretrained(beside)
    harnessed = HFLM(pretrained=model.to(best_device()), tokenizer=tokenizer, batch_size=args.batch)
    try:
        found = lm_eval.simple_evaluate(
            harnessed, tasks=names, task_manager=manager, num_fewshot=args.shots, limit=args.limit,
            apply_chat_template=args.chat, log_samples=False,
        )  # fmt: skip
    except (OSError, ValueError) as error:  # what the library of data sets says without a network, and without a cache
        raise MachineError(f"lm-eval could not measure {folder}: {error}") from error
    return lines(str(folder), found)


def lines(model: str, found: Mapping[str, Any]) -> list[Plain]:
    """A line for each figure of each task, of what lm-eval gives back."""
    return [
        {"task": task, "metric": name.partition(",")[0], "filter": name.partition(",")[2], "model": model, "value": value,
         "deviation": _number(figures.get(name.replace(",", "_stderr,"))),
         "questions": found["n-samples"].get(task, {}).get("effective")}
        for task, figures in found["results"].items() for name, value in figures.items()
        if "," in name and "_stderr," not in name
    ]  # fmt: skip


def _number(value: Any) -> float | None:
    """lm-eval writes "N/A" where it knows no deviation."""
    return value if isinstance(value, float) else None


def shown(line: Plain) -> str:
    """One line for a terminal."""
    spread = "" if line["deviation"] is None else f" ± {line['deviation']:.4f}"
    return f"{line['task']:<28} {line['metric']:<16} {line['value']:.4f}{spread}  {line['questions'] or ''}  {line['model']}"


def _write(report: Plain, out: Path) -> None:
    """report.json, report.csv and report.html."""
    out.mkdir(parents=True, exist_ok=True)
    pages.save(report, out)
    rows = [["–" if value is None else str(value) for value in line.values()] for line in report["lines"]]
    body = pages.table(list(report["lines"][0]), rows)
    page = pages.page("Public benchmarks", body, report["settings"], report["machine"])
    (out / "report.html").write_text(page, encoding="utf-8")
