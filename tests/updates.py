"""Runs without training, and updates of one value: what tests of coordinators send."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_client.releases import Releases
from edge_client.transport import Connection
from wire import run_spec, spec
from wire.delta import Delta, Layout, Tensor, Vector
from wire.errors import Reason, Refused
from wire.messages import Contribution, Metrics, ReleaseManifest, Task
from wire.run_spec import RunSpec

LAYOUT = Layout((Tensor("w", (40, 25)),))
BIG = Layout((Tensor("w", (1500, 1000)),))
BASE = "b" * 64


def make(name: str, **changes: Any) -> RunSpec:
    table: dict[str, Any] = {
        "name": name,
        "base": {"model": "toy", "format": "toy", "digest": BASE},
        "rounds": 1,
        "cohort": {"goal": 1},
        "method": {"id": "lora"},
        "codec": "float32",
    }
    return run_spec.parse(table | changes)


def created(connection: Connection, name: str, layout: Layout = LAYOUT, **changes: Any) -> tuple[RunSpec, Task]:
    run = make(name, **changes)
    connection.create_run(run, layout, np.zeros(layout.size, np.float32))
    task = connection.check_in("d1", (name,), 1.0)
    assert isinstance(task, Task)
    return run, task


def newest(connection: Connection, run: str, layout: Layout = LAYOUT) -> tuple[ReleaseManifest, Vector]:
    held = Releases().fetch(connection, connection.describe(run)[0], layout, np.zeros(layout.size, np.float32))
    return held.release, held.trajectory.adapter


def update(run: RunSpec, task: Task, layout: Layout = LAYOUT, value: float = 0.5) -> tuple[Contribution, bytes]:
    chain = run.chain()
    assert chain is not None
    delta = Delta(layout, np.full(layout.size, value, np.float32))
    payload, _ = chain.encode(delta, chain.init(layout))
    return named(task, payload), payload


def named(task: Task, payload: bytes) -> Contribution:
    digest = spec.bytes_digest(payload)
    return Contribution(
        "d1", task.run, task.round, task.attempt, digest, len(payload), 5, BASE, task.release_digest, Metrics()
    )


def reason_of(call: Any) -> Reason:
    with pytest.raises(Refused) as caught:
        call()
    return caught.value.reason
