"""`edgetune quantize`: make a quantized base model."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

from quantize.base_model import QuantizedBase, build
from quantize.emulator import parse
from quantize.formats import FORMATS
from quantize.sources import BUILT_IN

EXAMPLES = """\
examples:
  edgetune quantize smollm2-135m --format nf4 --out bases/smollm2-nf4
  edgetune quantize smollm2-135m --format int4-onnx --out bases/smollm2-int4
  edgetune quantize ./Llama-3.2-1B --format int8 --out bases/llama-int8
  edgetune quantize model.gguf --format nf4 --out bases/mine
  edgetune quantize smollm2-135m --keep-layers 0,3,6,9,12,15,18,21,24-29 --out bases/emulator
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "model", metavar="MODEL", help=f"{', '.join(BUILT_IN)}, a Hugging Face folder, a .gguf file or a hub id"
    )
    parser.add_argument(
        "--format", choices=sorted(FORMATS), default="nf4", help="of the linear layers; default: %(default)s"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new folder")
    parser.add_argument(
        "--keep-layers",
        metavar="LAYERS",
        help="an emulator: leave the others out (docs/emulators.md); such as 0,4,8,24-29",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")


def run(args: argparse.Namespace) -> int:
    started = time.monotonic()
    keep = None if args.keep_layers is None else parse(args.keep_layers)
    made = build if args.json else _shown
    base = made(args.model, args.format, args.out, keep=keep)
    seconds = time.monotonic() - started
    if args.json:
        shown = {"out": str(args.out), "format": base.format, "identity": base.identity, "bytes": base.bytes_on_disk}
        print(json.dumps({**shown, "seconds": round(seconds, 1)}))
    else:
        print(
            f"{args.out}: {base.bytes_on_disk / 1e6:.0f} MB of {base.format}, identity {base.identity}, {seconds:.1f} s"
        )
    return 0


def _shown(model: str, base_format: str, out: Path, keep: Sequence[int] | None) -> QuantizedBase:
    from tqdm import tqdm

    with tqdm(desc=f"{model} to {base_format}", disable=None, leave=False, unit="tensor") as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return build(model, base_format, out, show, keep)
