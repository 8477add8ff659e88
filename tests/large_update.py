"""A client process with one 8 MB update: `python -m tests.large_update ADDRESS STATE`, to be killed and started at will.

It takes its task, writes the update down and sends it, all with the client's own code; only the training is left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from edge_client.participate import take_part
from edge_client.session import Device, Session
from edge_client.state import DeviceState, Pending
from edge_client.transport import Connection
from wire import run_spec, spec
from wire.delta import Delta, Layout, Tensor
from wire.messages import Contribution, Metrics, Task

LAYOUT = Layout((Tensor("w", (2000, 1000)),))
BASE = "b" * 64
RUN = run_spec.parse(
    {
        "name": "large",
        "base": {"model": "toy", "format": "toy", "digest": BASE},
        "rounds": 1,
        "cohort": {"goal": 1},
        "method": {"id": "lora"},
        "codec": "float32",
    }
)


def update(task: Task) -> Pending:
    chain = RUN.chain()
    assert chain is not None
    values = np.random.default_rng(1).uniform(-1, 1, LAYOUT.size).astype(np.float32)
    payload, codec_state = chain.encode(Delta(LAYOUT, values), chain.init(LAYOUT))
    digest = spec.bytes_digest(payload)
    named = ("d1", RUN.name, task.round, task.attempt, digest, len(payload), 1, BASE, task.release_digest)
    return Pending(Contribution(*named, Metrics()), payload, codec_state, task.release_version)


def main(address: str, folder: str) -> None:
    state = DeviceState(Path(folder), "d1")
    with Connection(address) as connection:
        task = connection.check_in(state.device, (RUN.name,), 5.0)
        assert isinstance(task, Task), task
        if state.pending(RUN) is None:
            state.prepare(update(task), RUN)
        take_part(connection, Session(Device(Path()), ()), state, task, tell)  # nothing is left to compute


def tell(event: str, values: dict[str, Any]) -> None:
    print(json.dumps({"event": event, **values}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
