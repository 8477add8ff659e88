"""A coordinator that says each no of the table, once or for ever, and what the client does with its update."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from grpc_status import rpc_status

from coordinator.refusals import status_of
from edge_client import calls
from edge_client.participate import take_part
from edge_client.session import Device, Session
from edge_client.state import DeviceState, Pending
from edge_client.transport import Connection
from protos.v1 import federation_pb2 as pb
from protos.v1 import federation_pb2_grpc as pb_grpc
from wire import run_spec, spec
from wire.contract import CONTRACT, Action
from wire.delta import Layout, Tensor
from wire.errors import Reason, Refused, RemoteError
from wire.messages import CHUNK_BYTES, Contribution, Metrics, ReleaseManifest, Task

LAYOUT = Layout((Tensor("w", (4,)),))
RUN = run_spec.parse(
    {
        "name": "r",
        "base": {"model": "toy", "format": "toy"},
        "rounds": 3,
        "cohort": {"goal": 1},
        "method": {"id": "lora"},
    }
)
TASK = Task("r", 1, 1, "train", 0, "c" * 64, RUN.digest, LAYOUT.digest, 60.0)
SMALL, LARGE = bytes(100), bytes(range(256)) * 5000


class Coordinator(pb_grpc.FederationServicer):
    """Says no to the calls of `to`, `times` in all, and is a good coordinator otherwise."""

    def __init__(self, no: Reason | grpc.StatusCode, to: str, times: int, after_s: float = 0.05) -> None:
        self._no, self._to, self._times, self._after_s = no, to, times, after_s
        self._received = 0
        self.left, self.counted = 0, 0

    def _say(self, call: str, context: grpc.ServicerContext) -> None:
        if call != self._to or not self._times:
            return
        self._times -= 1
        if isinstance(self._no, Reason):
            refused = Refused(self._no, "injected", retry_after_s=self._after_s)
            context.abort_with_status(rpc_status.to_status(status_of(refused)))
        context.abort(self._no, "injected")

    def DescribeRun(self, request: Any, context: Any) -> pb.RunDescription:
        return pb.RunDescription(spec_json=spec.canonical(RUN).decode(), layout_json=spec.canonical(LAYOUT).decode())

    def Submit(self, request: Any, context: Any) -> pb.Receipt:
        self._say("Submit", context)
        return self._receipt(request.contribution)

    def CreateUpload(self, request: Any, context: Any) -> pb.UploadState:
        self._say("CreateUpload", context)
        return pb.UploadState(upload="u", offset=self._received)

    def AppendUpload(self, parts: Any, context: Any) -> pb.UploadState:
        self._say("AppendUpload", context)
        for part in parts:
            assert part.offset == self._received
            self._received += len(part.data)
        return pb.UploadState(upload="u", offset=self._received)

    def Commit(self, request: Any, context: Any) -> pb.Receipt:
        self._say("Commit", context)
        assert self._received == request.size
        return self._receipt(request)

    def Leave(self, request: Any, context: Any) -> pb.LeaveReply:
        self.left += 1
        return pb.LeaveReply()

    def _receipt(self, mine: Any) -> pb.Receipt:
        self.counted += 1
        return pb.Receipt(run=mine.run, round=mine.round, attempt=mine.attempt, device=mine.device, digest=mine.digest)


@contextmanager
def serving(coordinator: Coordinator) -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_FederationServicer_to_server(coordinator, server)  # type: ignore[no-untyped-call]  # generated code
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


@pytest.fixture
def state(tmp_path: Path) -> Iterator[DeviceState]:
    opened = DeviceState(tmp_path / "state", "d")
    yield opened
    opened.close()


def written_down(state: DeviceState, payload: bytes) -> None:
    digest = spec.bytes_digest(payload)
    mine = Contribution("d", "r", 1, 1, digest, len(payload), 2, "b" * 64, "c" * 64, Metrics())
    state.prepare(Pending(mine, payload, {"0.residual": np.zeros(4, np.float32)}, 0), RUN)


def took_part(address: str, state: DeviceState, patience_s: float = 20.0) -> list[str]:
    """The events of sending what is written down, or the error's name last."""
    events: list[str] = []
    with Connection(address, patience_s) as connection:
        try:
            take_part(connection, Session(Device(Path()), ()), state, TASK, lambda event, _: events.append(event))
        except RemoteError as error:
            events.append(type(error).__name__)
    return events


@pytest.mark.parametrize("name", ["another", "../../r"])
def test_a_task_whose_run_is_described_by_another_name_is_refused(name: str) -> None:
    task = dataclasses.replace(TASK, run=name)  # the coordinator below describes "r", whatever it is asked for
    with serving(Coordinator(Reason.BUSY, "Submit", 0)) as address, Connection(address) as connection:
        assert Session(Device(Path()), ()).described(connection, TASK) == (RUN, LAYOUT)
        with pytest.raises(Refused, match="otherwise than its task does"):
            Session(Device(Path()), ()).described(connection, task)


CALLS = [("Submit", SMALL), ("CreateUpload", LARGE), ("AppendUpload", LARGE), ("Commit", LARGE)]
FOR_EVER = 10_000


@pytest.mark.parametrize(("call", "payload"), CALLS, ids=[call for call, _ in CALLS])
@pytest.mark.parametrize("no", list(Reason))
def test_each_reason_said_once_has_the_outcome_of_its_row(
    state: DeviceState, no: Reason, call: str, payload: bytes
) -> None:
    written_down(state, payload)
    coordinator = Coordinator(no, call, 1)
    with serving(coordinator) as address:
        events = took_part(address, state)
    kept, action = state.pending(RUN) is not None, CONTRACT[no].action
    expected: dict[Action, tuple[str, int, bool]] = {
        Action.RETRY: ("submitted", 1, False),
        Action.RESUME: ("submitted", 1, False),
        Action.NEXT: ("too_late", 0, False),
        Action.DROP: ("Refused", 0, False),
        Action.ASK: ("Refused", 0, True),
    }
    assert (events[-1], coordinator.counted, kept) == expected[action]
    assert (state.record("r").rounds == 1) == (coordinator.counted == 1)


@pytest.mark.parametrize(("call", "payload"), CALLS, ids=[call for call, _ in CALLS])
@pytest.mark.parametrize("no", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED])
def test_a_status_without_a_reason_is_waited_out(
    state: DeviceState, no: grpc.StatusCode, call: str, payload: bytes
) -> None:
    written_down(state, payload)
    coordinator = Coordinator(no, call, 2)
    with serving(coordinator) as address:
        assert took_part(address, state)[-1] == "submitted"
    assert (coordinator.counted, state.pending(RUN)) == (1, None)


KEPT: list[Reason | grpc.StatusCode] = [
    reason for reason, rule in CONTRACT.items() if rule.action in (Action.RETRY, Action.RESUME)
]
KEPT += [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL]


@pytest.mark.parametrize("no", KEPT, ids=lambda no: no.name)
def test_when_patience_ends_the_update_is_kept_its_place_too_and_the_next_client_sends_it(
    state: DeviceState, no: Reason | grpc.StatusCode
) -> None:
    written_down(state, SMALL)
    coordinator = Coordinator(no, "Submit", FOR_EVER)
    with serving(coordinator) as address:
        assert took_part(address, state, patience_s=0.3)[-1] in ("Refused", "Unreachable", "RemoteError")
    assert state.pending(RUN) is not None and coordinator.left == 0
    good = Coordinator(no, "", 0)
    with serving(good) as address:
        assert took_part(address, state)[-1] == "submitted"
    assert good.counted == 1


def test_a_coordinator_that_asks_for_a_pause_gets_it(state: DeviceState) -> None:
    written_down(state, SMALL)
    with serving(Coordinator(Reason.BUSY, "Submit", 1, after_s=0.7)) as address:
        began = time.monotonic()
        assert took_part(address, state)[-1] == "submitted"
    assert time.monotonic() - began >= 0.7


class Silent(Coordinator):
    """Says nothing to the first call for a release, nor to the first update, and answers those that follow."""

    def __init__(self) -> None:
        super().__init__(Reason.BUSY, "nothing", 0)
        self._heard: set[str] = set()
        self.ended = threading.Event()

    def _first(self, call: str) -> None:
        if call not in self._heard:
            self._heard.add(call)
            self.ended.wait(30)

    def FetchRelease(self, request: Any, context: Any) -> Iterator[pb.ReleaseChunk]:
        self._first("FetchRelease")
        release = ReleaseManifest.first(RUN, LAYOUT, "a" * 64)
        yield pb.ReleaseChunk(release=pb.Release(manifest_json=spec.canonical(release).decode()), data=bytes(16))

    def Submit(self, request: Any, context: Any) -> pb.Receipt:
        self._first("Submit")
        return super().Submit(request, context)


def test_a_call_whose_answer_is_lost_is_made_again_when_the_slowest_link_would_have_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calls, "CALL_S", 0.5)
    coordinator, mine = (
        Silent(),
        Contribution("d", "r", 1, 1, spec.bytes_digest(SMALL), 100, 2, "b" * 64, "c" * 64, Metrics()),
    )
    began = time.monotonic()
    with serving(coordinator) as address, Connection(address) as connection:
        assert len(connection.release("r", 16, 0).data) == 16
        assert connection.send(mine, SMALL).digest == mine.digest
        coordinator.ended.set()
    assert time.monotonic() - began < 10


def test_a_deadline_leaves_the_slowest_link_the_time_it_takes() -> None:
    assert calls.transfer_s(20_000_000) > 3600 and calls.transfer_s(CHUNK_BYTES) > 200
    assert calls.transfer_s(20_000) < calls.CALL_S + 5
