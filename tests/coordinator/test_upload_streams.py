"""Parts that come on one stream: what is durable of them when, and what is looked at once."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from coordinator import ingest
from coordinator import uploads as taking
from coordinator.stores import Place, files
from coordinator.uploads import PLACES
from edge_client import uploads as sending
from edge_client.transport import Connection
from protos.v1 import federation_pb2 as pb
from tests.coordinator.test_uploads import Device, cohort, honest, no, replicas
from wire import spec
from wire.errors import Reason
from wire.messages import PART_BYTES as PART


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    return Place.of(str(tmp_path / "store"), None)


class Stream:
    """A stream of parts that goes on when it is told to."""

    def __init__(self, device: Device) -> None:
        self._go_on, self._parts = threading.Semaphore(0), list[pb.UploadPart]()
        self.call: Any = device.stub.AppendUpload.future(self._sent(), timeout=30)

    def _sent(self) -> Iterator[pb.UploadPart]:
        while self._go_on.acquire(timeout=30) and self._parts:
            yield self._parts.pop(0)

    def send(self, *parts: pb.UploadPart) -> None:
        self._parts += parts
        self._go_on.release(len(parts))

    def end(self) -> int:
        self._go_on.release()
        return int(self.call.result().offset)


def durable(device: Device, offset: int) -> bool:
    """Whether a look at the upload says so within ten seconds."""
    until = time.monotonic() + 10
    while device.create().offset != offset and time.monotonic() < until:
        time.sleep(0.02)
    return device.create().offset == offset


def test_what_came_on_a_stream_that_was_cut_is_durable(folder: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taking, "PAUSE_S", 60.0)
    with replicas(folder) as [replica]:
        device = Device(replica)
        upload, stream = device.create().upload, Stream(device)
        stream.send(device.part(upload, 0), device.part(upload, PART))
        file = Path(folder.blobs) / upload[:2] / upload
        while file.stat().st_size < 2 * PART:
            time.sleep(0.01)
        stream.call.cancel()
        assert durable(device, 2 * PART)


def test_a_stream_that_is_cut_while_what_came_is_being_made_durable_loses_nothing(
    folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, let_go, sync = threading.Event(), threading.Event(), files._Growing.sync

    def slow(blob: files._Growing) -> None:
        began.set()
        let_go.wait(10)
        sync(blob)

    monkeypatch.setattr(files._Growing, "sync", slow)
    with replicas(folder) as [replica]:
        device = Device(replica)
        upload, stream = device.create().upload, Stream(device)
        stream.send(device.part(upload, 0))
        assert began.wait(10)
        stream.call.cancel()
        time.sleep(0.3)
        let_go.set()
        assert durable(device, PART)


def test_a_sender_that_asks_while_what_it_sent_is_being_made_durable_is_told_of_all_of_it(
    folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taking, "PAUSE_S", 0.5)
    with replicas(folder) as [replica]:
        device = Device(replica)
        upload, stream = device.create().upload, Stream(device)
        stream.send(device.part(upload, 0), device.part(upload, PART))
        file = Path(folder.blobs) / upload[:2] / upload
        while file.stat().st_size < 2 * PART:
            time.sleep(0.01)
        assert device.create().offset == 2 * PART
        assert stream.end() == 2 * PART


def test_what_came_before_a_pause_is_durable_and_the_stream_goes_on(folder: Place) -> None:
    with replicas(folder) as [replica]:
        device = Device(replica)
        upload, stream = device.create().upload, Stream(device)
        stream.send(device.part(upload, 0))
        assert durable(device, PART)
        stream.send(device.part(upload, PART))
        assert stream.end() == 2 * PART


def test_who_pauses_holds_nothing_and_a_stream_that_was_overtaken_is_told_where_to_go_on(folder: Place) -> None:
    with replicas(folder, 2) as (first, second):
        device = Device(first)
        upload, stream = device.create().upload, Stream(device)
        stream.send(device.part(upload, 0))
        assert durable(device, PART)
        assert device.at(second).append(device.part(upload, PART)) == 2 * PART
        stream.send(device.part(upload, PART))
        assert no(stream.end) == (Reason.WRONG_OFFSET, grpc.StatusCode.ABORTED, None, str(2 * PART))


def test_what_came_before_a_part_that_is_damaged_is_durable(folder: Place) -> None:
    with replicas(folder) as [replica]:
        device = Device(replica)
        upload = device.create().upload
        damaged = device.part(upload, PART, digest="0" * 64)
        refused = no(lambda: device.append(device.part(upload, 0), damaged, device.part(upload, 2 * PART)))
        assert refused[0] is Reason.BAD_CHUNK and refused[3] == str(PART)
        assert device.create().offset == PART


def test_a_part_is_checked_by_its_crc_where_it_has_one(folder: Place) -> None:
    with replicas(folder) as [replica]:
        device = Device(replica)
        upload = device.create().upload
        data = device.payload[:PART]
        by_crc: dict[str, Any] = {"digest": "", "crc32": zlib.crc32(data)}
        for damaged in ({**by_crc, "crc32": 1}, {**by_crc, "data": bytes([data[0] ^ 1]) + data[1:]}):
            assert no(lambda changes=damaged: device.append(device.part(upload, 0, **changes)))[0] is Reason.BAD_CHUNK
        assert device.append(device.part(upload, 0, **by_crc)) == PART


@pytest.mark.parametrize("crc32", [True, False])
def test_a_client_says_the_check_that_its_coordinator_takes(crc32: bool) -> None:
    payload = bytes(range(256)) * 4096
    state = pb.UploadState(upload="0" * 32, crc32=crc32)
    parts = list(sending._parts(state, "d1", memoryview(payload), 0))
    assert b"".join(part.data for part in parts) == payload
    assert all(part.HasField("crc32") == crc32 and bool(part.digest) != crc32 for part in parts)


def test_a_link_that_is_quick_gets_longer_parts_and_one_that_is_slow_the_shortest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s = [0.0]
    monkeypatch.setattr(sending, "time", type("Clock", (), {"monotonic": staticmethod(lambda: now_s[0])}))
    sizes = list[int]()
    for part in sending._parts(pb.UploadState(crc32=True), "d1", memoryview(bytes(8 * PART)), 0):
        sizes.append(4 * len(part.data) // PART)
        now_s[0] += 2.0 if len(sizes) == 3 else 0.1
    assert sizes == [1, 4, 8, 4, 8, 7]


def test_an_upload_that_came_through_one_process_is_hashed_as_it_comes_and_not_again(
    folder: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed = list[int]()

    def noted(data: Any) -> str:
        hashed.append(len(data))
        return spec.bytes_digest(data)

    monkeypatch.setattr(ingest, "spec", type("Spec", (), {"bytes_digest": staticmethod(noted)}))
    with replicas(folder, 2) as (first, second):
        device = Device(first)
        device.send_all()
        assert device.commit().digest == device.mine.digest and not hashed
        other = Device(first, "shared")
        upload = other.create().upload
        other.append(other.part(upload, 0))
        other.at(second).append(other.part(upload, PART))
        for offset in range(2 * PART, len(other.payload), PART):
            other.append(other.part(upload, offset))
        assert other.commit().digest == other.mine.digest and hashed == [len(other.payload)]


def test_bytes_that_another_process_added_are_not_taken_for_those_that_were_hashed(folder: Place) -> None:
    with replicas(folder, 2) as (first, second):
        device = Device(first)
        upload, there = device.create().upload, device.at(second)
        device.append(device.part(upload, 0))
        there.payload = bytes(len(device.payload))
        for offset in range(PART, len(device.payload), PART):
            there.append(there.part(upload, offset))
        assert no(device.commit)[0] is Reason.BAD_DIGEST


def test_senders_that_pause_after_a_part_are_not_in_the_way_of_others(folder: Place) -> None:
    with replicas(folder, device_uploads=3 * PLACES, device_parts=2 * PLACES) as [replica]:
        undisturbed = max(honest(replica, cohort(replica, "alone")))
        streams = list[Stream]()
        for number in range(2 * PLACES):
            device = Device(replica, f"slow{number}")
            streams.append(Stream(device))
            streams[-1].send(device.part(device.create().upload, 0))
        disturbed = max(honest(replica, cohort(replica, "beside")))
        assert not any(stream.call.done() for stream in streams)
        assert [stream.end() for stream in streams] == [PART] * len(streams)
    assert disturbed < 2 * undisturbed + 2.0  # two turns of pauses, and this machine's other work


def test_a_client_whose_link_was_cut_goes_on_in_small_steps(folder: Place) -> None:
    with replicas(folder) as [replica]:
        device = Device(replica)
        upload, told = device.create().upload, list[int]()
        device.append(device.part(upload, 0))
        with Connection(replica.address) as connection:
            connection.send(device.mine, device.payload, lambda sent, _: told.append(sent // PART))
        assert told[:3] == [1, 2, 6]
        fresh, told = Device(replica, "fresh"), list[int]()
        with Connection(replica.address) as connection:
            connection.send(fresh.mine, fresh.payload, lambda sent, _: told.append(sent))
        assert told == [0, min(sending.CALL_BYTES, len(fresh.payload)), len(fresh.payload)][: len(told)]
