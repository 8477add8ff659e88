"""A real coordinator process, real gRPC, and callers that do not behave."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from coordinator.uploads import TURN_S
from edge_client.transport import Connection
from protos.v1 import federation_pb2 as pb
from protos.v1 import federation_pb2_grpc as pb_grpc
from tests.processes import CoordinatorProcess, edgetune
from tests.updates import BIG, LAYOUT, created, make, named, newest, reason_of, update
from wire.delta import Layout, Tensor
from wire.errors import Reason, Unreachable
from wire.messages import PROTOCOL, Contribution, Finished, Metrics, Task, Wait
from wire.run_spec import Downlink, RunSpec


def test_a_round_of_one_device_publishes_exactly_what_it_sent(connection: Connection) -> None:
    run, task = created(connection, "one")
    connection.send(*update(run, task))
    evaluate = connection.check_in("d1", ("one",), 10.0)
    assert isinstance(evaluate, Task) and evaluate.kind == "evaluate"
    release, adapter = newest(connection, "one")
    assert (release.version, release.parent) == (1, task.release_digest)
    np.testing.assert_array_equal(adapter, np.full(LAYOUT.size, 0.5, np.float32))
    done = dataclasses.replace(
        named(evaluate, b"x"), digest="", size=0, metrics=Metrics(loss_before=1.5, held_out_tokens=4)
    )
    connection.send(done, b"")
    assert connection.check_in("d1", ("one",), 0.0) == Finished(("one",))
    status = connection.status("one")
    assert (status.state, status.releases[1].held_out_loss) == ("done", 1.5)


def test_a_large_update_travels_in_chunks_and_counts_the_same(connection: Connection) -> None:
    run, task = created(connection, "large", BIG)
    contribution, payload = update(run, task, BIG)
    assert len(payload) > 4 << 20
    first = connection.send(contribution, payload)
    assert connection.send(contribution, payload) == first
    assert isinstance(connection.check_in("d1", ("large",), 10.0), Task)
    np.testing.assert_array_equal(newest(connection, "large", BIG)[1], np.full(BIG.size, 0.5, np.float32))


def broken_payloads(run: RunSpec, task: Task) -> Iterator[tuple[str, Contribution, bytes, Reason]]:
    contribution, payload = update(run, task)
    yield "size", dataclasses.replace(contribution, size=len(payload) - 1), payload, Reason.BAD_SIZE
    yield "digest", dataclasses.replace(contribution, digest="0" * 64), payload, Reason.BAD_DIGEST
    yield "base", dataclasses.replace(contribution, base_digest="1" * 64), payload, Reason.WRONG_BASE
    yield "release", dataclasses.replace(contribution, release_digest="1" * 64), payload, Reason.WRONG_BASE
    yield "oversized", named(task, payload + b"x"), payload + b"x", Reason.TOO_LARGE
    yield "truncated", named(task, payload[:-4]), payload[:-4], Reason.BAD_PAYLOAD
    not_finite = payload[:-4] + np.float32("nan").tobytes()
    yield "not finite", named(task, not_finite), not_finite, Reason.NOT_FINITE
    huge = payload[:-4] + np.float32(1e30).tobytes()
    yield "out of range", named(task, huge), huge, Reason.OUT_OF_RANGE


def test_every_broken_update_is_refused_by_name_counted_and_the_round_goes_on(connection: Connection) -> None:
    run, task = created(connection, "broken")
    expected: dict[str, int] = {}
    for what, contribution, payload, reason in broken_payloads(run, task):
        assert reason_of(lambda c=contribution, p=payload: connection.send(c, p)) is reason, what
        expected[reason.value] = expected.get(reason.value, 0) + 1
    status = connection.status("broken")
    assert (status.refused, status.accepted, status.state) == (expected, 0, "running")
    connection.send(*update(run, task))
    assert isinstance(connection.check_in("d1", ("broken",), 10.0), Task)


def test_an_update_under_another_layout_or_codec_is_refused_by_name(connection: Connection) -> None:
    run, task = created(connection, "named")
    other_layout = Layout((Tensor("v", (40, 25)),))
    payload = update(run, task, other_layout)[1]
    assert reason_of(lambda: connection.send(named(task, payload), payload)) is Reason.WRONG_LAYOUT
    other_codec = make("named", codec="float16")
    payload = update(other_codec, task)[1]
    assert reason_of(lambda: connection.send(named(task, payload), payload)) is Reason.WRONG_CODEC


def test_a_commit_of_bytes_that_were_never_uploaded_is_refused(
    connection: Connection, coordinator: CoordinatorProcess
) -> None:
    run, task = created(connection, "absent")
    contribution, _ = update(run, task, value=0.25)
    with grpc.insecure_channel(coordinator.address) as channel, pytest.raises(grpc.RpcError) as caught:
        pb_grpc.FederationStub(channel).Commit(contribution.to_proto(), timeout=5)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    "first",
    [
        pb.UploadChunk(digest="../../etc/passwd", size=3, data=b"abc"),
        pb.UploadChunk(digest="0" * 64, size=3, data=b"abc"),
        pb.UploadChunk(digest=hashlib.sha256(b"abc").hexdigest(), size=2, data=b"abc"),
        pb.UploadChunk(digest=hashlib.sha256(b"abc").hexdigest(), size=4, data=b"abc"),
        pb.UploadChunk(digest=hashlib.sha256(b"abc").hexdigest(), size=1 << 40, data=b"abc"),
    ],
)
def test_an_upload_that_is_not_what_it_declares_leaves_nothing(
    coordinator: CoordinatorProcess, first: pb.UploadChunk
) -> None:
    before = sorted(Path(coordinator.store).glob("blobs/??/*"))
    with grpc.insecure_channel(coordinator.address) as channel, pytest.raises(grpc.RpcError) as caught:
        pb_grpc.FederationStub(channel).Upload(iter([first]), timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert sorted(Path(coordinator.store).glob("blobs/??/*")) == before
    assert list(Path(coordinator.store).glob("blobs/aside/*")) == []


def test_runs_that_cannot_be_are_refused_before_anything_is_written(connection: Connection) -> None:
    zeros = np.zeros(LAYOUT.size, np.float32)
    good = make("never")
    nameless = dataclasses.replace(good, base=dataclasses.replace(good.base, digest=""))
    no_aggregator = dataclasses.replace(good, aggregator={"id": "os.system"})
    turned_twice = ({"id": "rank_rotate"}, {"id": "rank_rotate"}, {"id": "pack"})
    for run, layout, adapter in [
        (nameless, LAYOUT, zeros),
        (no_aggregator, LAYOUT, zeros),
        (dataclasses.replace(good, codec=turned_twice), LAYOUT, zeros),
        (dataclasses.replace(good, downlink=Downlink(turned_twice)), LAYOUT, zeros),
        (good, BIG, zeros),
        (good, LAYOUT, zeros + np.float32("inf")),
    ]:
        assert reason_of(lambda r=run, y=layout, a=adapter: connection.create_run(r, y, a)) in {
            Reason.BAD_REQUEST,
            Reason.BAD_SIZE,
            Reason.NOT_FINITE,
        }
    assert reason_of(lambda: connection.status("never")) is Reason.UNKNOWN_RUN


def test_a_check_in_is_held_until_there_is_work_or_time_is_up(connection: Connection) -> None:
    _run, task = created(connection, "held")
    waited = connection.check_in("d2", ("held",), 0.2)
    assert isinstance(waited, Wait) and waited.active_runs == 1 and 0 <= waited.retry_after_s < 1
    connection.leave("d1", task)
    assert isinstance(connection.check_in("d2", ("held",), 5.0), Task)


def test_a_wait_that_is_no_number_is_none_and_a_run_named_often_is_looked_at_once(
    coordinator: CoordinatorProcess, connection: Connection
) -> None:
    created(connection, "asked")  # its only place is taken
    ask = pb.CheckInRequest(device="d2", runs=["asked"] * 100_000, protocol=PROTOCOL, wait_s=float("nan"))
    with grpc.insecure_channel(coordinator.address) as channel:
        answer = pb_grpc.FederationStub(channel).CheckIn(ask, timeout=5)
    assert answer.wait.active_runs == 1


def test_uploads_that_stall_hold_nobody_up_for_long(coordinator: CoordinatorProcess) -> None:
    ended, body = threading.Event(), b"honest"

    def silent() -> Iterator[pb.UploadChunk]:
        ended.wait(30)
        yield from ()

    def stalled() -> Iterator[pb.UploadChunk]:
        yield pb.UploadChunk(digest="a" * 64, size=1 << 20, data=b"x")
        yield from silent()

    chunk = pb.UploadChunk(digest=hashlib.sha256(body).hexdigest(), size=len(body), data=body)
    with grpc.insecure_channel(coordinator.address) as channel:
        upload = pb_grpc.FederationStub(channel).Upload
        others = [upload.future(chunks(), timeout=40) for chunks in (silent, stalled) for _ in range(8)]
        began = time.monotonic()
        upload(iter([chunk]), timeout=30)
        assert time.monotonic() - began < 4 * TURN_S and not any(other.done() for other in others)
        ended.set()


def test_half_a_character_in_a_spec_is_refused_by_name(coordinator: CoordinatorProcess) -> None:
    request = pb.CreateRunRequest(spec_json='{"name": "\\ud800"}', layout_json="[]")
    with grpc.insecure_channel(coordinator.address) as channel, pytest.raises(grpc.RpcError) as caught:
        pb_grpc.AdministrationStub(channel).CreateRun(request, timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT and "surrogates" in str(caught.value.details())


def test_bad_device_names_and_other_protocols_are_refused(
    connection: Connection, coordinator: CoordinatorProcess
) -> None:
    assert reason_of(lambda: connection.check_in("../d", (), 0.0)) is Reason.BAD_REQUEST
    with grpc.insecure_channel(coordinator.address) as channel, pytest.raises(grpc.RpcError) as caught:
        pb_grpc.FederationStub(channel).CheckIn(pb.CheckInRequest(device="d", protocol=99), timeout=5)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_a_message_over_the_cap_is_refused_by_the_transport(coordinator: CoordinatorProcess) -> None:
    with grpc.insecure_channel(coordinator.address) as channel, pytest.raises(grpc.RpcError) as caught:
        pb_grpc.FederationStub(channel).Submit(pb.SubmitRequest(payload=bytes(5 << 20)), timeout=5)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_health_says_serving(coordinator: CoordinatorProcess) -> None:
    with grpc.insecure_channel(coordinator.address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_watching_a_run_ends_when_it_ends(connection: Connection) -> None:
    _run, _task = created(connection, "watched", cohort={"goal": 1, "deadline_s": 0.2, "max_attempts": 1})
    states = [status.state for status in connection.watch("watched")]
    assert states[0] == "running" and states[-1] == "failed"


def test_a_coordinator_that_is_not_there_is_said_in_one_line() -> None:
    with Connection("127.0.0.1:9") as nowhere, pytest.raises(Unreachable, match=r"127\.0\.0\.1:9"):
        nowhere.runs()


def test_a_port_in_use_is_one_clear_line(coordinator: CoordinatorProcess, tmp_path: Any) -> None:
    result = edgetune("coordinator", "serve", "--store", tmp_path, "--listen", coordinator.address)
    assert result.returncode == 1
    assert "the port is in use" in result.stderr
    assert len(result.stderr.splitlines()) == 1
