"""What a round costs without training: seconds, memory of the clients, memory of the coordinator.

Small: 8 client processes of the toy engine (one local step, 20 KB updates) take part in many rounds. Large: 8 and then 64
devices send updates of 19.5 MB all at once, each time to a fresh coordinator, whose peak memory is compared.

    python -m benchmarks.round_overhead [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import Popen

import numpy as np

from edge_client.transport import Connection
from tests.processes import CoordinatorProcess, edgetune, finished, start_client, write_texts, write_toy_spec
from wire import run_spec, spec
from wire.delta import Delta, Layout, Tensor
from wire.messages import Contribution, Finished, Metrics, Task
from wire.run_spec import RunSpec

CLIENTS, MANY = 8, 64
MOST_ROUND_S, MOST_CLIENT_MB, MOST_GROWTH = 0.2, 60.0, 1.2
BIG = Layout((Tensor("w", (4_884_480,)),))
"""Rank 16 on all linear layers of SmolLM2-135M: 19.5 MB of float32."""
BASE = "b" * 64


@dataclasses.dataclass(frozen=True)
class Result:
    """Peaks are of resident memory, in MB of 10^6 bytes."""

    rounds: int
    round_s: float
    client_peak_mb: float
    coordinator_peak_mb_8: float
    coordinator_peak_mb_64: float
    large_round_s_8: float
    large_round_s_64: float

    @property
    def growth(self) -> float:
        return self.coordinator_peak_mb_64 / self.coordinator_peak_mb_8

    @property
    def good(self) -> bool:
        fast = self.round_s <= MOST_ROUND_S and self.client_peak_mb <= MOST_CLIENT_MB
        return fast and self.growth <= MOST_GROWTH


def small(rounds: int, folder: Path) -> tuple[float, float]:
    """(seconds a round, largest peak of a client in MB)."""
    with CoordinatorProcess(folder / "store") as coordinator:
        wanted = {"rounds": rounds, "goal": CLIENTS, "minimum": CLIENTS, "local_steps": 1}
        made = edgetune(
            "run", "create", write_toy_spec(folder / "toy.toml", **wanted), "--coordinator", coordinator.address
        )
        if made.returncode:
            raise SystemExit(made.stderr)
        clients = [
            start_client(
                coordinator.address, write_texts(folder / f"{i}.jsonl", f"w{i}"), folder / str(i), name=f"d-{i}"
            )
            for i in range(CLIENTS)
        ]
        peaks = _peaks_mb(clients)
        with Connection(coordinator.address) as connection:
            releases = connection.status("toy").releases
    # Release 1 waits until all processes have started; from there on a round is a round.
    seconds = (releases[-1].published_at - releases[1].published_at) / (len(releases) - 2)
    return seconds, max(peaks)


def _peaks_mb(clients: list[Popen[str]]) -> list[float]:
    """The peak memory of each client, as it says itself with each update."""
    told = finished(clients, timeout_s=600.0)
    return [max(e["peak_rss_mb"] for e in events if "peak_rss_mb" in e) * 1.048576 for events in told]


def large(devices: int, folder: Path) -> tuple[float, float]:
    """(peak memory of the coordinator in MB, seconds from the first byte to the release)."""
    run = run_spec.parse(
        {
            "name": "large",
            "base": {"model": "toy", "format": "toy", "digest": BASE},
            "rounds": 1,
            "cohort": {"goal": devices, "minimum": devices},
            "method": {"id": "lora"},
            "codec": "float32",
        }
    )
    with CoordinatorProcess(folder / f"store-{devices}") as coordinator:
        with Connection(coordinator.address) as connection:
            connection.create_run(run, BIG, np.zeros(BIG.size, np.float32))
        started = time.monotonic()
        with ThreadPoolExecutor(devices) as pool:
            list(pool.map(lambda i: _send(coordinator.address, run, f"d-{i}", i), range(devices)))
        with Connection(coordinator.address) as connection:
            while len(connection.status("large").releases) < 2:
                time.sleep(0.01)
        return coordinator.rss_bytes(peak=True) / 1e6, time.monotonic() - started


def _send(address: str, run: RunSpec, device: str, number: int) -> None:
    with Connection(address) as connection:
        task = connection.check_in(device, (run.name,), 30.0)
        if not isinstance(task, Task):
            raise SystemExit(f"{device} got no task: {task}")
        values = np.full(BIG.size, np.float32(1e-3 * (number + 1)))
        chain = run.chain()
        assert chain is not None
        payload, _ = chain.encode(Delta(BIG, values), chain.init(BIG))
        connection.send(
            Contribution(
                device, run.name, task.round, task.attempt, spec.bytes_digest(payload), len(payload), 1, BASE,
                task.release_digest, Metrics(),
            ),
            payload,
        )  # fmt: skip
        assert not isinstance(task, Finished)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50, metavar="N", help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there, too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgetune-bench-") as made:
        round_s, client = small(args.rounds, Path(made))
        few, few_s = large(CLIENTS, Path(made))
        many, many_s = large(MANY, Path(made))
    result = Result(args.rounds, round_s, client, few, many, few_s, many_s)
    print(f"20 KB updates, {CLIENTS} client processes: {round_s:.3f} s a round (at most {MOST_ROUND_S})")
    print(f"client process: {client:.0f} MB at its peak (at most {MOST_CLIENT_MB:.0f})")
    print(f"19.5 MB updates: coordinator {few:.0f} MB at its peak with {CLIENTS} clients in {few_s:.1f} s,")
    print(f"  {many:.0f} MB with {MANY} in {many_s:.1f} s: {result.growth:.2f} times (at most {MOST_GROWTH})")
    if args.json:
        args.json.write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n", encoding="utf-8")
    return 0 if result.good else 1


if __name__ == "__main__":
    sys.exit(main())
