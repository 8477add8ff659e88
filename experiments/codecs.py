"""`edgetune experiment codecs`: every codec on deltas that clients recorded, over a ladder of rates."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from experiments import recorded
from experiments.rate_distortion import bound, variances
from experiments.recorded import Group
from wire.codecs import chain
from wire.codecs.chain import Chain
from wire.codecs.compositions import INT4, INT8, ROTATION
from wire.delta import Delta, Vector
from wire.errors import MissingExtra, UserError
from wire.spec import Plain

EXAMPLES = """\
examples:
  edgetune client join --data notes.jsonl --record-deltas deltas     record, on every device
  edgetune experiment codecs deltas                                  a table of all rows
  edgetune experiment codecs deltas --plot codecs.png                the same, and a picture
  edgetune experiment codecs deltas --rows ectcq,rotated_ectcq --json  one JSON object a point
  edgetune experiment codecs a.safetensors b.safetensors --rates 0.2,1,4

Files of one round of one run, from one release, are one group: their mean is what a coordinator would make of them. Which are one
is said on standard error. `relative_mse` is the error of a client's update, `aggregate_mse` that of the group's mean, each
relative to its energy; `gap_bits` is the distance from the Gaussian bound at the client's error, null where an update arrives
exactly: the bound is infinite there. No error feedback: each update by itself. Speeds are of one thread, in millions of entries
a second.
"""
RATES = (0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
LEAST_BITS, MOST_BITS = 0.05, 6.0
"""What the picture shows, wherever there is something."""
PICTURES = (".png", ".svg")
PACK: Plain = {"id": "pack"}
ENTROPY: Plain = {"id": "entropy"}
FRACTIONS = (0.01, 0.02, 0.05, 0.1, 0.25)


def ladder(rates: Sequence[float]) -> dict[str, list[list[Plain]]]:
    """The rows, each with its stages at every rate it has."""
    targets: list[Plain] = [{"id": "ecsq", "target_bits": rate} for rate in rates]
    paths: list[Plain] = [{**target, "states": 8} for target in targets]
    return {
        "rotated_ectcq": [[ROTATION, target, PACK] for target in paths],
        "ectcq": [[target, PACK] for target in paths],
        "rotated_ecsq": [[ROTATION, target, PACK] for target in targets],
        "ecsq": [[target, PACK] for target in targets],
        "float16": [[{"id": "float16"}, PACK]],
        "int8": [[INT8, PACK]],
        "int4": [[INT4, PACK]],
        "nf4": [[{"id": "normal_float"}, PACK]],
        "top_k_int4": [[{"id": "top_k", "fraction": f}, INT4, {"id": "rice"}, PACK] for f in FRACTIONS],
        "qsgd": [[{"id": "qsgd", "levels": s, "bucket": 512}, ENTROPY, PACK] for s in (4, 16, 64)],
        "dither": [[{"id": "dither", "relative": step}, ENTROPY, PACK] for step in (0.25, 0.5, 1.0, 2.0, 4.0)],
        "ternary": [[{"id": "ternary"}, ENTROPY, PACK]],
        "sign": [[{"id": "sign"}, PACK]],
        "eden": [[{"id": "eden", "bits": b}, PACK] for b in (1, 2, 3, 4)],
        "eden_unbiased": [[{"id": "eden", "bits": b, "unbiased": True}, PACK] for b in (1, 2, 3, 4)],
        "random_k_int4": [[{"id": "random_k", "fraction": f}, INT4, PACK] for f in FRACTIONS],
        "chunk_top_k": [[{"id": "chunk_top_k", "kept": k}, PACK] for k in (32, 64, 128, 512)],
        "count_sketch_int8": [[{"id": "count_sketch", "fraction": f}, INT8, PACK] for f in FRACTIONS],
        "projection_int8": [[{"id": "projection", "fraction": f}, INT8, PACK] for f in FRACTIONS],
        "projection_unbiased_int8": [
            [{"id": "projection", "fraction": f, "unbiased": True}, INT8, PACK] for f in FRACTIONS
        ],
    }


@dataclasses.dataclass(frozen=True)
class Point:
    """A row at one rate, over all files: means. `gap_bits` is None where some update arrives exactly."""

    row: str
    bits_per_param: float
    relative_mse: float
    aggregate_mse: float
    gap_bits: float | None
    encode_mparam_s: float
    decode_mparam_s: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("deltas", type=Path, nargs="+", metavar="DELTAS", help="safetensors files, or folders of them")
    parser.add_argument("--rows", metavar="ROW,…", help=f"default: all of {', '.join(ladder(()))}")
    parser.add_argument("--rates", metavar="BITS,…", help="bits a parameter of the rows that have a target")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a picture, PNG or SVG by its ending")
    parser.add_argument("--json", action="store_true", help="JSON on standard output, one object a point")


def run(args: argparse.Namespace) -> int:
    if args.plot is not None:
        _check_picture(args.plot)
    rows = ladder(RATES if args.rates is None else _rates(args.rates))
    codecs = [(row, chain.codec(stages)) for row in _wanted(args.rows, list(rows)) for stages in rows[row]]
    groups = recorded.grouped(recorded.found(args.deltas))
    for group in groups:
        print(group, file=sys.stderr)
    points = []
    for row, codec in codecs:
        points.append(measured(row, codec, groups))
        print(json.dumps(dataclasses.asdict(points[-1])) if args.json else _line(points[-1]), flush=True)
    if args.plot is not None:
        drawn = picture(points, args.plot)
        print(f"picture: {args.plot}" if drawn else "no picture: no error to draw", file=sys.stderr)
    return 0


def _check_picture(path: Path) -> None:
    """Raises UserError, or MissingExtra, before any work for a picture that could not be written after it."""
    if path.suffix.lower() not in PICTURES or path.is_dir():
        raise UserError(f"--plot {path}: expected the name of a file that ends in {' or '.join(PICTURES)}")
    if not os.access(path.parent, os.W_OK | os.X_OK) or not path.parent.is_dir():
        raise UserError(f"--plot {path}: {path.parent} is no folder that can be written into")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtra("matplotlib", "demo")


def _wanted(text: str | None, rows: Sequence[str]) -> Sequence[str]:
    wanted = rows if text is None else text.split(",")
    if unknown := sorted(set(wanted) - set(rows)):
        raise UserError(f"--rows: unknown row {unknown[0]!r}; choose of {', '.join(rows)}")
    return wanted


def _rates(text: str) -> list[float]:
    try:
        return [float(rate) for rate in text.split(",")]
    except ValueError as error:
        raise UserError(f"--rates {text!r}: expected numbers like 0.2,1,4") from error


def measured(row: str, codec: Chain, groups: Sequence[Group]) -> Point:
    """One point: every delta encoded and decoded by itself, and the mean of each group."""
    singles, means = [], []
    for group in groups:
        found = [_once(codec, delta) for delta in group.deltas]
        singles += [single for single, _ in found]
        truth, decoded = (np.mean([v.astype(np.float64) for v in some], axis=0) for some in _both(group.deltas, found))
        means.append(float(np.square(decoded - truth).sum() / np.square(truth).sum()))
    bits, relative, gap, encode, decode = (float(v) for v in np.mean(singles, axis=0))
    return Point(
        row=row,
        bits_per_param=round(bits, 5),
        relative_mse=round(relative, 6),
        aggregate_mse=round(float(np.mean(means)), 6),
        gap_bits=round(gap, 5) if math.isfinite(gap) else None,
        encode_mparam_s=round(1e-6 / encode, 1),
        decode_mparam_s=round(1e-6 / decode, 1),
    )


def _both(group: Sequence[Delta], found: Sequence[tuple[object, Vector]]) -> Iterator[list[Vector]]:
    yield [delta.vector for delta in group]
    yield [decoded for _, decoded in found]


def _once(codec: Chain, delta: Delta) -> tuple[tuple[float, ...], Vector]:
    """Bits an entry, relative error, gap, seconds an entry of encoding and of decoding (the better of two); what arrived."""
    size = delta.layout.size
    times = []
    for _ in range(2):  # the first one may load compiled loops
        began = time.thread_time()
        payload, _ = codec.encode(delta, codec.init(delta.layout))
        between = time.thread_time()
        decoded = codec.decode(payload, delta.layout).vector
        times.append((between - began, time.thread_time() - between))
    bits, truth = 8 * len(payload) / size, delta.vector.astype(np.float64)
    relative = float(np.square(decoded - truth).sum() / np.square(truth).sum())
    encode, decode = (min(some) / size for some in zip(*times, strict=True))
    return (bits, relative, bits - bound(*variances(delta), relative), encode, decode), decoded


def _line(point: Point) -> str:
    gap = "exact      " if point.gap_bits is None else f"{point.gap_bits:+7.3f} bit"
    return (
        f"{point.row:<16} {point.bits_per_param:8.4f} bit  client {point.relative_mse:8.5f}  mean {point.aggregate_mse:8.5f}"
        f"  gap {gap}  encode {point.encode_mparam_s:7.1f}  decode {point.decode_mparam_s:7.1f} Mparam/s"
    )


def picture(points: Sequence[Point], path: Path) -> bool:
    """Error of a client's update and of the mean against the rate; a line a row. False, and no picture, without any error."""
    points = [p for p in points if p.relative_mse > 0 and p.aggregate_mse > 0]  # logarithms know no others
    shown = [p for p in points if p.bits_per_param <= MOST_BITS] or points
    if not shown:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained", sharey=True)
    for side, (by, name) in zip(
        axes, {"relative_mse": "of an update", "aggregate_mse": "of the mean"}.items(), strict=True
    ):
        marks = itertools.cycle(("o-", "s-", "^-", "D--", "v--", "x--", "+--"))
        for row in dict.fromkeys(point.row for point in points):
            mine = sorted((p.bits_per_param, getattr(p, by)) for p in points if p.row == row)
            flagship = row.endswith(("ecsq", "ectcq"))
            style = {"lw": 2.2 if flagship else 1.1, "ms": 5 if flagship else 4}
            side.plot(*zip(*mine, strict=True), next(marks), label=row, **style)
        lowest, most = min(getattr(p, by) for p in shown), max(p.bits_per_param for p in shown)
        side.set(xlim=(LEAST_BITS, MOST_BITS if most <= MOST_BITS else 1.2 * most))
        side.set(ylim=(lowest / 1.5, 1.6))  # what is worse than nothing is in the table
        side.set(xscale="log", yscale="log", xlabel="bits a parameter", ylabel=f"relative squared error {name}")
        side.grid(alpha=0.3)
        side.spines[["top", "right"]].set_visible(False)
    ecsq = [
        (p.bits_per_param - p.gap_bits, p.relative_mse) for p in points if p.row == "ecsq" and p.gap_bits is not None
    ]
    if by_bound := sorted(ecsq):
        axes[0].plot(*zip(*by_bound, strict=True), "k--", lw=1)
        axes[1].plot([], [], "k--", lw=1, label="Gaussian bound, by tensor")
    axes[1].legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return True
