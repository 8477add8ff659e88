"""What keeping the lower layers' activations saves: local steps of LoRA in the last layers, with and without, in one process.

The same sequences come again and again, as in the epochs of a round. "whole" computes all layers for each batch at once, as an
engine without the cache does; "alone" computes the lower ones for one sequence at a time and forgets them; "kept" keeps them. CPU
seconds, the least of all turns; the first pass over the sequences counts. Losses of "alone" and "kept" are compared bit for bit.

    python -m benchmarks.kept_activations [--layers N] [--sequences N] [--epochs N] [--turns N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks.train_overhead import base
from edge_client.adapters.low_rank import LoraFactors
from edge_client.engines import Optimizer, Tokens
from edge_client.engines.torch_engine import TorchEngine
from edge_client.engines.torch_lower import Lower

BATCH, LENGTH = 4, 128
SIDES = ("whole", "alone", "kept")


def sequences(count: int) -> list[Tokens]:
    chance = np.random.Generator(np.random.Philox(key=0))
    return [Tokens(row, row) for row in chance.integers(100, 40_000, (count, LENGTH)).astype(np.int32)]


def timed(engine: TorchEngine, side: str, given: list[Tokens], epochs: int) -> tuple[float, list[float]]:
    """CPU seconds and the losses of `epochs` over `given`, nothing kept from before."""
    engine.keeps = side != "whole"
    engine.write(LoraFactors(layers=1).initial(engine.layout, 0))
    engine.start(Optimizer(), [0])
    engine.start(Optimizer())  # forgets how steps were planned, and what was kept
    batches = [given[at : at + BATCH] for at in range(0, len(given), BATCH)] * epochs
    engine._fit(batches[0])
    if side == "alone":
        engine._lower = Lower(engine._body, engine._lowest, 0)
    began = time.process_time()
    losses = [engine.step(batch, 1e-3) for batch in batches]
    return time.process_time() - began, losses


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("layers", 6), ("sequences", 8), ("epochs", 3), ("turns", 2)):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args()
    adapter = LoraFactors(rank=8, layers=args.layers)
    engine = TorchEngine.load(base(), adapter, adapter.layout(base()), threads=1)
    given = sequences(args.sequences)
    timed(engine, "whole", given[:BATCH], 1)  # the first steps also reserve memory
    turns = [{side: timed(engine, side, given, args.epochs) for side in SIDES} for _ in range(args.turns)]
    seconds = {side: min(turn[side][0] for turn in turns) for side in SIDES}
    if any(turn["kept"][1] != turn["alone"][1] for turn in turns):
        raise SystemExit("losses with and without what is kept differ")
    for side, took in seconds.items():
        print(f"{side:6} {took:.2f} CPU s, {took / seconds['whole']:.3f} of whole")
    if args.json:
        args.json.write_text(
            json.dumps({"seconds": seconds} | vars(args), default=str, indent=1) + "\n", encoding="utf-8"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
