"""`edgetune experiment`: measurements that anybody can run again. A module for each, imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from typing import Any

EXPERIMENTS: Mapping[str, tuple[str, str]] = {
    "codecs": ("experiments.codecs", "every codec on recorded deltas: rate, error, distance from the bound, speed"),
    "bandwidth": ("experiments.bandwidth", "federations behind slow links: held-out loss against bytes and time"),
    "benchmark": (
        "experiments.benchmark",
        "the survey's methods beside each other: quality, bytes, memory, compute, fairness",
    ),
    "simulate": (
        "experiments.simulate",
        "one federation of many virtual devices, here, in several processes or on Ray",
    ),
    "public": ("experiments.public", "what was taken home on public benchmarks, by lm-eval"),
    "quality": ("experiments.quality", "federations in one process: what coded updates and releases leave of the gain"),
}
"""Name -> (module with EXAMPLES, add_arguments and run, summary)."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="experiment", required=True, metavar="EXPERIMENT")
    for name, (module, summary) in EXPERIMENTS.items():
        row: Any = importlib.import_module(module)
        layout = argparse.RawDescriptionHelpFormatter
        row.add_arguments(
            commands.add_parser(name, help=summary, description=summary, epilog=row.EXAMPLES, formatter_class=layout)
        )


def run(args: argparse.Namespace) -> int:
    module: Any = importlib.import_module(EXPERIMENTS[args.experiment][0])
    code: int = module.run(args)
    return code
