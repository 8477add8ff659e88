"""What a client adds to training: its steps against a bare peft + bitsandbytes loop, on the same batches.

Both sides tune rank 8 on all linear layers of the same NF4 base, AdamW, bfloat16 products, each in its own process,
in turns. The bare side loads the base as plain weights through transformers' own 4-bit quantization and takes the loss from
the model, as a script of a few lines would. Time is the median of the steps after the first two; memory is the peak
of the process.

    python -m benchmarks.train_overhead [--steps N] [--turns N] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edge_client import bases, export
from edge_client.engines import Tokens
from edge_client.methods.lora import Lora
from edge_client.participate import peak_rss_bytes
from quantize import QuantizedBase
from wire.run_spec import BaseRef

MODEL = BaseRef("smollm2-135m", "nf4")
METHOD = Lora(rank=8, alpha=16.0, batch=4, sequence_length=128)
MOST = 1.05
WARM_UP = 2


@dataclasses.dataclass(frozen=True)
class Side:
    """One process: seconds a step, peak bytes, loss of the last step."""

    step_s: float
    peak_bytes: int
    loss: float


def batches(steps: int) -> list[list[Tokens]]:
    """The same batches on both sides: what is in them does not matter, their shape does."""
    chance = np.random.Generator(np.random.Philox(key=0))
    shape = (steps, METHOD.batch, METHOD.sequence_length)
    ids = chance.integers(100, 40_000, shape).astype(np.int32)
    return [[Tokens(row, row) for row in batch] for batch in ids]


def base() -> QuantizedBase:
    found = bases.find(MODEL)
    assert isinstance(found, QuantizedBase)
    return found


def edgetune(steps: int) -> Side:
    from edge_client.engines.torch_engine import TorchEngine

    layout = METHOD.tunes().layout(base())
    engine = TorchEngine.load(base(), METHOD.tunes(), layout)
    engine.write(METHOD.tunes().initial(layout, 0))
    engine.start(METHOD.optimizer)
    given = iter(batches(steps))
    return timed(lambda: engine.step(next(given), METHOD.learning_rate), steps)


def bare(steps: int, plain: Path) -> Side:
    import peft
    import torch
    import transformers

    quantized = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=quantized, dtype=torch.bfloat16, device_map="cpu"
    )
    targets = list(METHOD.tunes().placement(base()).linears)
    model = peft.get_peft_model(
        model, peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    )
    model.train()
    tuned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(tuned, lr=METHOD.learning_rate, weight_decay=0.0)
    given = iter(batches(steps))

    def step() -> float:
        ids = torch.from_numpy(np.stack([t.ids for t in next(given)])).long()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return timed(step, steps)


def timed(step: Callable[[], float], steps: int) -> Side:
    seconds, loss = [], 0.0
    for _ in range(steps):
        began = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - began)
    return Side(statistics.median(seconds[WARM_UP:]), peak_rss_bytes(), loss)


def in_turns(steps: int, turns: int) -> dict[str, list[Side]]:
    """Each side `turns` times, one after the other, so that a slow spell of the machine meets both."""
    measured: dict[str, list[Side]] = {"bare": [], "edgetune": []}
    with tempfile.TemporaryDirectory(prefix="edgetune-bench-") as made:
        plain = Path(made) / "plain"
        layout = METHOD.tunes().layout(base())
        export.to_merged(base(), METHOD.tunes().placement(base()), layout, np.zeros(layout.size, np.float32), plain)
        for _ in range(turns):
            for side, sides in measured.items():
                line = [sys.executable, "-m", "benchmarks.train_overhead", "--side", side, "--steps", str(steps)]
                done = subprocess.run([*line, "--plain", str(plain)], capture_output=True, text=True, check=False)
                if done.returncode:
                    raise SystemExit(done.stderr)
                sides.append(Side(**json.loads(done.stdout.splitlines()[-1])))
    return measured


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="default: %(default)s")
    parser.add_argument("--turns", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    parser.add_argument("--side", choices=["bare", "edgetune"], help=argparse.SUPPRESS)
    parser.add_argument("--plain", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        warnings.simplefilter("ignore")
        print(
            json.dumps(
                dataclasses.asdict(edgetune(args.steps) if args.side == "edgetune" else bare(args.steps, args.plain))
            )
        )
        return 0
    measured = in_turns(args.steps, args.turns)
    step = {side: min(s.step_s for s in sides) for side, sides in measured.items()}
    peak = {side: min(s.peak_bytes for s in sides) / 1e6 for side, sides in measured.items()}
    for side, sides in measured.items():
        print(f"{side:9} {step[side]:.3f} s a step, {peak[side]:,.0f} MB peak, last loss {sides[0].loss:.4f}")
    time_ratio, memory_ratio = step["edgetune"] / step["bare"], peak["edgetune"] / peak["bare"]
    print(f"ratio     {time_ratio:.3f} of the time, {memory_ratio:.3f} of the memory (each at most {MOST})")
    if args.json:
        figures = {"step_s": step, "peak_mb": peak, "time_ratio": time_ratio, "memory_ratio": memory_ratio}
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0 if max(time_ratio, memory_ratio) <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
