"""What coding leaves of what an update computes: the error of the products B A, and not of the entries (docs/codecs.md).

    python -m benchmarks.product_error deltas --rates 0.2,1

Takes one run's deltas, of all its rounds, as `edgetune client join --record-deltas` writes them. Each round starts from the
initial adapter of `--seed` and the means of the rounds before, as releases do where devices have as many examples each. Told is
the error of an update, and that of the mean of a round's: ‖BA coded - BA‖² / ‖BA - BA at the start‖².
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coordinator.aggregators.products import Update, aggregation_error
from edge_client.adapters.low_rank import LoraFactors
from experiments.recorded import grouped
from wire.codecs import chain
from wire.codecs.chain import Chain
from wire.codecs.compositions import ROTATION
from wire.delta import Delta, Layout, Vector
from wire.spec import Plain

PACK: Plain = {"id": "pack"}
HALVINGS: Mapping[str, list[Plain]] = {
    "equal steps": [],
    **{f"A {2**n} times": [{"id": "balance", "halvings": n}] for n in (1, 2)},
}
KINDS: Mapping[str, list[Plain]] = {"ecsq": [], "rotated_ecsq": [ROTATION]}


def error(layout: Layout, start: Vector, truth: Vector, coded: Vector) -> float:
    """The relative squared error of the products, of a delta from `start`."""
    found = aggregation_error(layout, start, start + coded, [Update(truth, 1)])
    return float("nan") if found is None else found**2


def errors(codec: Chain, start: Vector, deltas: Sequence[Delta]) -> tuple[float, float, float]:
    """Bits a parameter, error of an update, error of the mean."""
    layout = deltas[0].layout
    payloads = [codec.encode(delta, codec.init(layout))[0] for delta in deltas]
    coded = [codec.decode(payload, layout).vector for payload in payloads]
    each = [error(layout, start, delta.vector, arrived) for delta, arrived in zip(deltas, coded, strict=True)]
    bits = 8 * float(np.mean([len(payload) for payload in payloads])) / layout.size
    return bits, float(np.mean(each)), error(layout, start, mean(delta.vector for delta in deltas), mean(coded))


def norms(layout: Layout, adapter: Vector) -> tuple[float, float]:
    """Of the factors A and of B, the mean over modules."""
    of: dict[str, list[float]] = {"lora_A": [], "lora_B": []}
    for tensor, place in layout.slices():
        of[tensor.role].append(float(np.linalg.norm(adapter[place])))
    return float(np.mean(of["lora_A"])), float(np.mean(of["lora_B"]))


def mean(vectors: Iterable[Vector]) -> Vector:
    return np.asarray(np.mean(list(vectors), axis=0, dtype=np.float64), np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("deltas", type=Path, help="a folder of safetensors files")
    parser.add_argument("--rates", default="0.2,1", help="bits a parameter; default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="the run's; default: %(default)s")
    args = parser.parse_args()
    rounds = [group.deltas for group in grouped(sorted(args.deltas.rglob("*.safetensors")))]
    start = LoraFactors().initial(rounds[0][0].layout, args.seed)
    for number, deltas in enumerate(rounds, 1):
        for rate in map(float, args.rates.split(",")):
            for kind, before in KINDS.items():
                print(f"round {number}, {kind} at {rate:g}: {_line(rate, before, start, deltas)}", flush=True)
        start = start + mean(delta.vector for delta in deltas)
        print("round {}: norms afterwards {:.2f} of A, {:.2f} of B".format(number, *norms(deltas[0].layout, start)))


def _line(rate: float, before: list[Plain], start: Vector, deltas: Sequence[Delta]) -> str:
    told = []
    for name, first in HALVINGS.items():
        stages: list[Any] = [*first, *before, {"id": "ecsq", "target_bits": rate}, PACK]
        bits, client, of_mean = errors(chain.codec(stages), start, deltas)
        told.append(f"{name} {client:.3f} mean {of_mean:.3f} ({bits:.3f} bits)")
    return ", ".join(told)


if __name__ == "__main__":
    main()
