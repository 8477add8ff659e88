"""Several coordinator processes: on one port, and apart over one store."""

from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from edge_client.transport import Connection
from protos.v1 import federation_pb2 as pb
from protos.v1 import federation_pb2_grpc as pb_grpc
from tests.processes import CoordinatorProcess, edgetune
from tests.updates import LAYOUT, created, make, update
from wire import spec
from wire.messages import CHUNK_BYTES, Finished, Task, Wait

Answer = Task | Wait | Finished


class Held(threading.Thread):
    """A check-in that a coordinator holds until there is work, or until it ends."""

    def __init__(self, address: str, wait_s: float, device: str = "d1") -> None:
        super().__init__()
        self._address, self._wait_s, self._device = address, wait_s, device
        self.answer: Answer | None = None
        self.start()
        time.sleep(1.0)  # until it is held
        assert self.answer is None

    def run(self) -> None:
        with Connection(self._address) as connection:
            self.answer = connection.check_in(self._device, (), self._wait_s)

    def answered(self, within_s: float) -> Answer:
        self.join(within_s)
        assert self.answer is not None, f"no answer in {within_s} s"
        return self.answer


def create(address: str) -> None:
    with Connection(address) as connection:
        connection.create_run(make("toy"), LAYOUT, np.zeros(LAYOUT.size, np.float32))


@pytest.mark.parametrize("kind", ["embedded", "shared"])
def test_a_check_in_held_by_one_process_is_answered_when_another_opens_a_round(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    store, more = str(tmp_path / "store"), list[str]()
    if kind == "shared":
        store = request.getfixturevalue("postgres_server").fresh()
        more = ["--blobs", str(tmp_path / "blobs")]
    with (
        CoordinatorProcess(store, "127.0.0.1:0", *more) as one,
        CoordinatorProcess(store, "127.0.0.1:0", *more) as other,
    ):
        held = Held(other.address, 30.0)
        create(one.address)
        assert isinstance(held.answered(2.0), Task)


def test_a_check_in_held_anywhere_hears_at_once_that_the_run_has_ended(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "store") as one, CoordinatorProcess(tmp_path / "store") as other:
        with Connection(one.address) as connection:
            run, task = created(connection, "ending")
            trained, payload = update(run, task)
            connection.send(trained, payload)
            evaluation = connection.check_in("d1", ("ending",), 20.0)
            assert isinstance(evaluation, Task) and evaluation.kind == "evaluate"
            held = [Held(one.address, 30.0, "d2"), Held(other.address, 30.0, "d3")]
            what: dict[str, Any] = {"round": 2, "release_digest": evaluation.release_digest, "digest": "", "size": 0}
            connection.send(dataclasses.replace(trained, **what), b"")
        assert all(isinstance(each.answered(2.0), Finished) for each in held)


def test_a_replica_that_is_killed_is_said_and_replaced_while_the_others_serve(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "store", "127.0.0.1:0", "--replicas", "2") as together:
        first = together.replicas[1]
        os.kill(first, signal.SIGKILL)
        ended = together.event("replica_ended")
        assert (ended["replica"], ended["pid"], ended["code"]) == (1, first, -signal.SIGKILL)
        together.event("replica_started")
        assert together.replicas[1] != first
        create(together.address)
        alone = edgetune("coordinator", "serve", "--store", tmp_path / "b", "--listen", together.address)
        group = edgetune(
            "coordinator", "serve", "--store", tmp_path / "b", "--listen", together.address, "--replicas", "2"
        )
        for refused in (alone, group):
            assert refused.returncode == 1 and "the port is in use" in refused.stderr
            assert len(refused.stderr.splitlines()) == 1
        replicas = list(together.replicas.values())
        assert together.stop() == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in replicas)


def test_replicas_end_with_their_parent(tmp_path: Path) -> None:
    together = CoordinatorProcess(tmp_path / "store", "127.0.0.1:0", "--replicas", "2")
    together.kill()
    give_up = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in together.replicas.values()):
        assert time.monotonic() < give_up, "a replica outlives its parent"
        time.sleep(0.1)


def test_a_coordinator_that_is_told_to_end_says_so_answers_what_it_holds_and_ends(tmp_path: Path) -> None:
    coordinator = CoordinatorProcess(tmp_path / "store")
    with grpc.insecure_channel(coordinator.address) as channel:
        health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert next(health).status == health_pb2.HealthCheckResponse.SERVING
        held = Held(coordinator.address, 60.0)
        asked = time.monotonic()
        coordinator.process.send_signal(signal.SIGTERM)
        assert next(health).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert isinstance(held.answered(3.0), Wait)
        health.cancel()
    assert coordinator.process.wait(10) == 0 and time.monotonic() - asked < 8


def test_an_upload_under_way_is_finished_by_a_coordinator_that_is_told_to_end(tmp_path: Path) -> None:
    coordinator = CoordinatorProcess(tmp_path / "store")
    data = bytes(3 * CHUNK_BYTES)
    digest = spec.bytes_digest(data)

    def chunks() -> Iterator[pb.UploadChunk]:
        yield pb.UploadChunk(digest=digest, size=len(data), data=data[:CHUNK_BYTES])
        time.sleep(0.5)
        coordinator.process.send_signal(signal.SIGTERM)
        time.sleep(1.0)
        yield pb.UploadChunk(data=data[CHUNK_BYTES : 2 * CHUNK_BYTES])
        yield pb.UploadChunk(data=data[2 * CHUNK_BYTES :])

    with grpc.insecure_channel(coordinator.address) as channel:
        stub = pb_grpc.FederationStub(channel)  # type: ignore[no-untyped-call]  # generated code
        assert stub.Upload(chunks(), timeout=20).digest == digest
    assert coordinator.process.wait(10) == 0
    assert (tmp_path / "store" / "blobs" / digest[:2] / digest).stat().st_size == len(data)


def test_a_store_that_cannot_be_opened_is_said_once_whatever_the_number_of_replicas(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = edgetune(
        "coordinator", "serve", "--store", tmp_path / "file", "--replicas", "3", "--listen", "127.0.0.1:0"
    )
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
