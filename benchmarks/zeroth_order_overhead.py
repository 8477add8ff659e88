"""What zeroth order costs: a ±ε step against two bare forwards, and the onnx client's memory against the NF4 client's.

    make bench-zo

Each figure is a ratio of two measurements of one run: a step against forwards of the same session, taken in turns; the
peak memory of a process that tunes by losses under onnxruntime against one that tunes by gradients on NF4 under torch, both
with batches of one sequence of 128 tokens of SmolLM2-135M.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np

from edge_client import bases
from edge_client.adapters import Adapter
from edge_client.data import Example
from edge_client.engines import ENGINES
from edge_client.methods import METHODS, Draw, Method
from edge_client.participate import peak_rss_bytes
from wire import spec
from wire.run_spec import BaseRef
from wire.scalars import Directions, Trajectory

TEXT = "Four score and seven years ago our fathers brought forth on this continent a new nation. " * 60
PAIRS = 12
PROCESSES = {
    "onnx, mezo": ("onnx", "int4-onnx", {"id": "mezo", "local_steps": 3, "batch": 1}),
    "torch, lora on NF4": ("torch", "nf4", {"id": "lora", "local_steps": 3, "batch": 1}),
}


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(_tuned(*PROCESSES[sys.argv[1]]) | {"client_modules": _client()}))
        return
    for name in ("onnx", "torch"):
        ratio = step_ratio(name)
        print(f"{name}: a step of ±ε costs {ratio:.3f} of two forwards (at most 1.10)")
    peaks = {name: _process(name) for name in PROCESSES}
    for name, peak in peaks.items():
        print(f"{name}: {peak >> 20} MiB at most")
    small, large = peaks.values()
    print(f"memory: {small / large:.2f} of the NF4 client's (at most 0.45), {small / 1e6:.0f} MB (at most 450)")


def step_ratio(name: str) -> float:
    """Median over pairs, in processor seconds: one after the other, so that both meet the same machine."""
    table = {"id": "mezo", "local_steps": 1, "batch": 1}
    method: Method = spec.build(METHODS, table)
    engine, layout, start = _loaded(name, "int4-onnx", method.tunes())
    train = engine.tokenize([Example(text=TEXT)], 128)[:1]
    engine.losses(train, [start, start])
    ratios = []
    state = Trajectory.start(method.directions() or Directions(), layout, start)
    for number in range(PAIRS):
        draw = Draw(number)
        step = _seconds(lambda draw=draw: method.train(engine, state, train, draw))
        bare = _seconds(lambda: engine.losses(train, [start, start]))
        ratios.append(step / bare)
    return statistics.median(ratios)


def _seconds(work: Any) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def _loaded(name: str, base_format: str, adapter: Adapter) -> tuple[Any, Any, Any]:
    base = bases.find(BaseRef("smollm2-135m", base_format))
    layout = adapter.layout(base)
    chosen: Any = spec.row_class(ENGINES, name)
    return chosen.load(base, adapter, layout, threads=1), layout, adapter.initial(layout, 0)


def _tuned(engine_name: str, base_format: str, table: dict[str, Any]) -> dict[str, int]:
    method: Method = spec.build(METHODS, table)
    engine, layout, initial = _loaded(engine_name, base_format, method.tunes())
    train = engine.tokenize([Example(text=TEXT)], 128)
    state = Trajectory.start(method.directions() or Directions(), layout, initial)
    for number in range(2):
        engine.write(state.adapter)
        engine.loss(train[:4])
        trained = method.train(engine, state, train, Draw(number))
        assert np.isfinite(trained.loss)
    return {"peak": peak_rss_bytes()}


def _client() -> list[str]:
    """What a client imports beside its engine, so that its memory counts."""
    from edge_client import participate, session, transport

    return [module.__name__ for module in (participate, session, transport)]


def _process(name: str) -> int:
    line = [sys.executable, "-m", "benchmarks.zeroth_order_overhead", name]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout.strip().splitlines()[-1])["peak"])


if __name__ == "__main__":
    main()
