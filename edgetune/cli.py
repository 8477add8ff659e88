"""`edgetune`: one program, a module for each command, imported when it is asked for."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from wire.errors import EdgetuneError, MachineError, MissingExtra, UserError, ended

INTERRUPTED = 130
FORESEEN = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.EPERM})
"""What the disk may say without being a fault of the program."""
EXTRAS = {
    **dict.fromkeys(("torch", "transformers", "peft", "bitsandbytes"), "torch"),
    **dict.fromkeys(("tokenizers", "safetensors", "psutil", "gguf", "jinja2", "tqdm", "zstandard"), "client"),
    "onnxruntime": "onnx",
    "numba": "fast",
    **dict.fromkeys(("rich", "segno"), "coordinator"),
    "cryptography": "identity",
    "matplotlib": "demo",
    "psycopg": "postgres",
    "obstore": "s3",
    "prometheus_client": "metrics",
    "opentelemetry": "telemetry",
    "lm_eval": "public",
}
"""Package -> the extra that brings it."""


@dataclasses.dataclass(frozen=True)
class Command:
    """A row of COMMANDS: the module that has `add_arguments(parser)` and `run(args) -> int`."""

    module: str
    summary: str


COMMANDS = {
    "demo": Command(
        "edgetune.demo.cli", "a whole federation on this machine: coordinator, clients, real text, a report"
    ),
    "client": Command("edge_client.cli", "join runs from the device that holds the data; doctor, generate, status"),
    "coordinator": Command("edgetune.devices", "make identities, serve runs; invite, list and revoke devices"),
    "run": Command("edgetune.runs", "create, watch, pause, verify and export runs"),
    "middle": Command("edgetune.middle", "split learning: compute a model's middle layers for devices with its ends"),
    "experiment": Command("experiments.cli", "measure codecs: on recorded deltas, in federations, behind slow links"),
    "quantize": Command("quantize.cli", "make the quantized base model that devices share"),
}
EXAMPLES = """\
examples:
  edgetune demo                                      see it work, in eight minutes, with nothing but this machine
  edgetune coordinator serve                         on the machine that devices can reach
  edgetune run create speeches.toml                  say what is tuned, and how
  edgetune client join --data notes.jsonl            on every device
  edgetune run watch speeches                        look on

EDGETUNE_CACHE says where base models are kept; EDGETUNE_TRACEBACK=1 shows where an error arose.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code. 0 done, 1 it could not be done, 2 it was asked wrongly, 130 interrupted."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # its errors reach us as exceptions, and are said in our words
    try:
        args = _parser(given).parse_args(given)
        code: int = args.start(args)
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        if "--json" in given:
            print(json.dumps({"event": "ended", "error": "interrupted"}))
        return INTERRUPTED
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads on: do not fail at exit again
        return 1
    except Exception as error:
        return _explained(error, "--json" in given)


class _Misuse(UserError):
    """What argparse cannot read; `said` is its own way to say so."""

    def __init__(self, program: str, problem: str, usage: str) -> None:
        super().__init__(f"{program}: {problem}")
        self.said = f"{usage}{program}: error: {problem}"


class _Parser(argparse.ArgumentParser):
    """One that does not end the program: what cannot be read is said as all other errors are."""

    def error(self, message: str) -> NoReturn:
        raise _Misuse(self.prog, message, self.format_usage())


def _parser(given: Sequence[str]) -> argparse.ArgumentParser:
    """The parser, with the arguments of the one command that is asked for: no other module is imported."""
    parser = _Parser(
        prog="edgetune",
        description="Federated fine-tuning of small language models on the devices that hold the data.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((word for word in given if not word.startswith("-")), None)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(name, help=command.summary, description=command.summary)
        if name == wanted:
            module: Any = importlib.import_module(command.module)
            module.add_arguments(sub)
            sub.set_defaults(start=module.run)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"edgetune {version('edgetune')}")
        except PackageNotFoundError:
            print("edgetune (not installed)")
        parser.exit(0)


def _explained(error: Exception, as_json: bool) -> int:
    """One line for an error that the program foresees, and one object where JSON is shown; a traceback for what it does not."""
    if os.environ.get("EDGETUNE_TRACEBACK") == "1":
        raise error
    ours = _ours(error)
    print(ours.said if isinstance(ours, _Misuse) else f"edgetune: {ours}", file=sys.stderr)
    if as_json:
        print(json.dumps(ended(ours)), flush=True)
    return int(ours.exit_code)  # type: ignore[attr-defined]  # quantize's errors have it, and no common ancestor


def _ours(error: Exception) -> Exception:
    """The error as one that has an exit code. Raises `error` if there is no such."""
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return MissingExtra(error.name, EXTRAS[error.name])
    if isinstance(error, OSError) and error.errno in FORESEEN:
        return MachineError(f"{error.filename or 'disk'}: {error.strerror}")
    if isinstance(error, EdgetuneError) or hasattr(error, "exit_code"):
        return error
    raise error
