"""Large updates in parts, over real gRPC: two replicas of one store in this process, and callers that do not behave."""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from coordinator.administration import Administration
from coordinator.bell import Bell
from coordinator.core import Core
from coordinator.garbage import sweep
from coordinator.guards import Guards, Limits
from coordinator.meter import Meter
from coordinator.serve import OPTIONS, warn_of_little_room
from coordinator.service import Federation
from coordinator.stores import Place, Store
from coordinator.stores.memory import MemoryBlobs
from coordinator.stores.uploads import Upload
from coordinator.uploads import forget_expired
from edge_client.transport import Connection
from protos.v1 import federation_pb2 as pb
from protos.v1 import federation_pb2_grpc as pb_grpc
from tests.links import Link
from tests.updates import BASE, BIG, created, make, reason_of, update
from wire import spec
from wire.contract import RETRY_AFTER_S
from wire.delta import Layout, Tensor
from wire.errors import Reason, Refused
from wire.messages import PART_BYTES as PART
from wire.messages import Contribution, Metrics, Task

MIDDLE = Layout((Tensor("w", (600, 500)),))


class Replica:
    """One coordinator's services over a store, on a loop of their own."""

    def __init__(self, place: Place, limits: Limits) -> None:
        self._place, self._limits = place, limits
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready: Future[tuple[str, Store]] = Future()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        self._thread.start()
        self.address, self.store = self._ready.result(30)

    async def _serve(self) -> None:
        store = self._place.open()
        with ThreadPoolExecutor(1) as compute, ThreadPoolExecutor(4) as disk:
            core = Core(store, compute, disk, Bell(), Bell(), Bell(), Meter(), limits=self._limits)
            server = grpc.aio.server(options=OPTIONS)
            pb_grpc.add_FederationServicer_to_server(Federation(core), server)  # type: ignore[no-untyped-call]  # generated code
            pb_grpc.add_AdministrationServicer_to_server(Administration(core), server)  # type: ignore[no-untyped-call]  # the same
            checks = health.aio.HealthServicer()
            health_pb2_grpc.add_HealthServicer_to_server(checks, server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            await checks.set("", health_pb2.HealthCheckResponse.SERVING)
            self._ready.set_result((f"127.0.0.1:{port}", store))
            await self._stop.wait()
            await server.stop(1)
            await store.ledger.close()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


@contextmanager
def replicas(place: Place, count: int = 1, **limits: Any) -> Iterator[list[Replica]]:
    with ExitStack() as stack:
        running = []
        for _ in range(count):
            running.append(Replica(place, Limits(**limits)))
            stack.callback(running[-1].stop)
        yield running


@pytest.fixture(params=["folder", "servers"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return Place.of(str(tmp_path / "store"), None)
    servers = [request.getfixturevalue(name) for name in ("postgres_server", "s3_server")]
    return Place.of(*[server.fresh() for server in servers])


@pytest.fixture
def folder(tmp_path: Path) -> Place:
    return Place.of(str(tmp_path / "store"), None)


class Device:
    """Makes the calls of an upload one by one, and not always as it should."""

    def __init__(self, replica: Replica, name: str = "large", **changes: Any) -> None:
        self.channel = grpc.insecure_channel(replica.address, options=[("grpc.use_local_subchannel_pool", 1)])
        self.stub = pb_grpc.FederationStub(self.channel)  # type: ignore[no-untyped-call]  # generated code
        with Connection(replica.address) as connection:
            run, self.task = created(connection, name, BIG, **changes)
        self.mine, self.payload = update(run, self.task, BIG)

    def at(self, replica: Replica) -> Device:
        """The same device, that calls another replica."""
        other = copy.copy(self)
        other.channel = grpc.insecure_channel(replica.address)
        other.stub = pb_grpc.FederationStub(other.channel)  # type: ignore[no-untyped-call]  # generated code
        return other

    def create(self, mine: Contribution | None = None) -> pb.UploadState:
        state: pb.UploadState = self.stub.CreateUpload((mine or self.mine).to_proto(), timeout=10)
        return state

    def part(self, upload: str, start: int, size: int = PART, **changes: Any) -> pb.UploadPart:
        data = self.payload[start : start + size]
        table: dict[str, Any] = {"upload": upload, "device": "d1", "offset": start}
        return pb.UploadPart(**table | {"digest": spec.bytes_digest(data), "data": data} | changes)

    def append(self, *parts: pb.UploadPart) -> int:
        return int(self.stub.AppendUpload(iter(parts), timeout=10).offset)

    def send_all(self) -> str:
        upload, offset = str(self.create().upload), 0
        while offset < len(self.payload):
            offset = self.append(self.part(upload, offset))
        return upload

    def commit(self, mine: Contribution | None = None) -> pb.Receipt:
        receipt: pb.Receipt = self.stub.Commit((mine or self.mine).to_proto(), timeout=30)
        return receipt


def no(call: Any) -> tuple[Reason, grpc.StatusCode, float | None, str | None]:
    """The reason, the status, when to come again, and the offset, of a refusal."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
    status = rpc_status.from_call(caught.value)
    assert status is not None, caught.value
    again_s = None
    for detail in status.details:
        detail.Unpack(info)
        if detail.Unpack(retry):
            again_s = retry.retry_delay.ToTimedelta().total_seconds()
    return Reason[info.reason], caught.value.code(), again_s, info.metadata.get("offset")


def kept(store: Store) -> set[str]:
    return set(store.blobs.digests())


def test_any_replica_goes_on_where_another_stopped_and_the_receipt_is_one(place: Place) -> None:
    with replicas(place, 2) as (first, second):
        device = Device(first)
        other = device.at(second)
        upload = device.create().upload
        offset = 0
        while offset < len(device.payload):
            offset = (device, other)[offset // PART % 2].append(device.part(upload, offset))
            assert (state := other.create()).offset == offset and state.upload == upload
        receipt = other.commit()
        assert device.commit() == receipt == device.create().receipt
        with Connection(first.address) as connection:
            assert connection.status("large").accepted == 1


def test_what_is_counted_leaves_no_part_behind(place: Place) -> None:
    with replicas(place) as [replica]:
        device = Device(replica)
        before = kept(replica.store)
        upload = device.send_all()
        meanwhile = kept(replica.store) - before
        assert meanwhile == {upload} or len(meanwhile) == -(-len(device.payload) // PART)
        device.commit()
        assert kept(replica.store) == before | {device.mine.digest}


def test_a_part_anywhere_but_at_the_end_is_refused_says_the_offset_and_changes_nothing(folder: Place) -> None:
    with replicas(folder) as [replica]:
        device = Device(replica)
        upload = device.create().upload
        device.append(device.part(upload, 0), device.part(upload, PART))
        before = kept(replica.store)
        for offset in (0, PART, PART * 2 - 1, PART * 2 + 1, 2**64 - 1):
            refused = no(lambda at=offset: device.append(device.part(upload, at % len(device.payload), offset=at)))
            assert refused == (Reason.WRONG_OFFSET, grpc.StatusCode.ABORTED, None, str(2 * PART))
        assert device.create().offset == 2 * PART and kept(replica.store) == before


def test_a_part_that_is_not_what_it_says_is_refused_and_changes_nothing(folder: Place) -> None:
    with replicas(folder) as [replica]:
        device = Device(replica)
        upload = device.create().upload
        good = device.part(upload, 0)
        damaged = good.data[:-1] + bytes([good.data[-1] ^ 1])
        before = kept(replica.store)
        for part, reason in [
            (device.part(upload, 0, data=damaged), Reason.BAD_CHUNK),
            (device.part(upload, 0, digest=""), Reason.BAD_CHUNK),
            (device.part(upload, 0, size=0), Reason.BAD_SIZE),
            (device.part(upload, 0, data=bytes(2 << 20)), Reason.TOO_LARGE),
            (device.part("0" * 32, 0), Reason.UNKNOWN_UPLOAD),
            (device.part("'; --", 0), Reason.UNKNOWN_UPLOAD),
            (device.part(upload, 0, device="d2"), Reason.NOT_ASSIGNED),
        ]:
            assert no(lambda p=part: device.append(p))[0] is reason
        assert no(device.append)[0] is Reason.BAD_REQUEST
        assert device.create().offset == 0 and kept(replica.store) == before


def test_a_part_that_goes_past_the_end_is_refused(folder: Place) -> None:
    with replicas(folder) as [replica]:
        device = Device(replica)
        upload = device.send_all()
        at = len(device.payload)
        assert no(lambda: device.append(device.part(upload, 0, offset=at)))[0] is Reason.BAD_SIZE
        assert device.commit().digest == device.mine.digest


def test_a_commit_before_the_last_byte_is_refused_and_the_rest_may_follow(folder: Place) -> None:
    with replicas(folder) as [replica]:
        device = Device(replica)
        upload = device.create().upload
        device.append(device.part(upload, 0))
        assert no(device.commit) == (Reason.WRONG_OFFSET, grpc.StatusCode.ABORTED, None, str(PART))
        for offset in range(PART, len(device.payload), PART):
            device.append(device.part(upload, offset))
        assert device.commit().digest == device.mine.digest


def test_a_commit_during_which_its_repetition_ends_the_upload_is_to_ask_again_and_then_has_the_receipt(
    folder: Place,
) -> None:
    with replicas(folder, 2) as (first, second):
        device, receipts = Device(first), list[pb.Receipt]()
        device.send_all()
        look: Any = first.store.ledger.look

        async def overtaken(work: Any) -> Any:
            found = await look(work)
            if not receipts and isinstance(found[0], Upload):
                receipts.append(await asyncio.to_thread(device.at(second).commit))
            return found

        first.store.ledger.look = overtaken  # type: ignore[method-assign]
        assert no(device.commit)[0] is Reason.UNKNOWN_BLOB
        assert [device.create().receipt] == receipts


def test_an_update_that_comes_in_while_it_is_begun_once_more_is_not_told_that_it_is_too_late(folder: Place) -> None:
    with replicas(folder, 2) as (first, second):
        device, receipts = Device(first), list[pb.Receipt]()
        device.send_all()
        check: Any = first.store.ledger.check

        async def overtaken(mine: Any) -> Any:
            found = await check(mine)
            if not receipts:
                receipts.append(await asyncio.to_thread(device.at(second).commit))
            return found

        first.store.ledger.check = overtaken  # type: ignore[assignment,method-assign]
        assert no(device.create)[0] is Reason.BUSY
        assert [device.create().receipt] == receipts


def test_a_whole_that_is_not_what_was_declared_is_refused_for_ever_and_leaves_nothing(place: Place) -> None:
    with replicas(place) as [replica]:
        device = Device(replica)
        before = kept(replica.store)
        device.mine = dataclasses.replace(device.mine, digest="0" * 64)
        device.send_all()
        assert no(device.commit)[:2] == (Reason.BAD_DIGEST, grpc.StatusCode.INVALID_ARGUMENT)
        assert kept(replica.store) == before
        assert no(device.commit)[0] is Reason.UNKNOWN_BLOB


def test_what_can_never_be_counted_is_refused_before_its_first_byte(folder: Place) -> None:
    with replicas(folder) as [replica]:
        device = Device(replica)
        for changes, reason in [
            ({"size": 7_000_000}, Reason.TOO_LARGE),
            ({"base_digest": "1" * 64}, Reason.WRONG_BASE),
            ({"round": 7}, Reason.NOT_ASSIGNED),
            ({"run": "nowhere"}, Reason.UNKNOWN_RUN),
            ({"digest": "", "size": 0}, Reason.BAD_REQUEST),
        ]:
            assert no(lambda c=changes: device.create(dataclasses.replace(device.mine, **c)))[0] is reason


def test_a_straggler_is_refused_at_its_next_part_counted_and_leaves_nothing(folder: Place) -> None:
    with replicas(folder) as [replica]:
        device = Device(replica, cohort={"goal": 2, "minimum": 1, "deadline_s": 1.0, "max_attempts": 1})
        before = kept(replica.store)
        upload = device.create().upload
        device.append(device.part(upload, 0))
        time.sleep(1.1)
        assert no(lambda: device.append(device.part(upload, PART)))[0] is Reason.ROUND_CLOSED
        assert kept(replica.store) == before
        with Connection(replica.address) as connection:
            assert connection.status("large").refused == {"ROUND_CLOSED": 1}


def test_an_older_device_sends_its_bytes_in_one_stream_and_commits_them(folder: Place) -> None:
    with replicas(folder) as [replica]:
        device = Device(replica)
        with Connection(replica.address) as connection:
            connection.upload(device.payload)
        assert device.commit().digest == device.mine.digest


def test_a_sender_that_stalls_is_dropped_within_its_bound_and_goes_on_from_what_it_sent(folder: Place) -> None:
    with replicas(folder, stall_s=0.4) as [replica]:
        device = Device(replica)
        upload, go_on = device.create().upload, threading.Event()

        def one_and_no_more() -> Iterator[pb.UploadPart]:
            yield device.part(upload, 0)
            go_on.wait(20)

        began = time.monotonic()
        refused = no(lambda: device.stub.AppendUpload(one_and_no_more(), timeout=20))
        assert refused[:2] == (Reason.STALLED, grpc.StatusCode.DEADLINE_EXCEEDED) and time.monotonic() - began < 5
        go_on.set()
        assert device.append(device.part(upload, device.create().offset)) == 2 * PART


def test_a_sender_that_is_never_silent_and_always_slow_has_stalled_too(folder: Place) -> None:
    with replicas(folder, stall_s=0.4, least_bytes_per_s=10_000) as [replica]:
        device = Device(replica)
        upload = device.create().upload

        def trickle() -> Iterator[pb.UploadPart]:
            for offset in range(0, 4000, 10):
                time.sleep(0.1)
                yield device.part(upload, offset, size=10)

        began = time.monotonic()
        assert no(lambda: device.stub.AppendUpload(trickle(), timeout=30))[0] is Reason.STALLED
        assert time.monotonic() - began < 10 and device.create().offset >= 10


def test_half_a_part_that_does_not_go_on_holds_its_place_no_longer_than_the_bound(folder: Place) -> None:
    with replicas(folder, stall_s=1.0, streams=1) as [replica], ThreadPoolExecutor(1) as pool:
        device = Device(replica)
        link = Link(replica.address)

        def send_over_the_link() -> str:
            with Connection(link.address) as connection:
                return connection.send(device.mine, device.payload).digest

        link.freeze_at(PART // 2)
        sending = pool.submit(send_over_the_link)
        assert link.was_frozen.wait(30)
        nobodys = device.part("0" * 32, 0)
        while no(lambda: device.append(nobodys))[0] is not Reason.BUSY:
            time.sleep(0.01)  # the half part is on its way through the server
        time.sleep(1.5)
        assert no(lambda: device.append(nobodys))[0] is Reason.UNKNOWN_UPLOAD
        link.thaw()
        assert sending.result(60) == device.mine.digest
        link.close()


def test_a_device_may_begin_so_many_uploads_and_is_told_when_to_come_again(folder: Place) -> None:
    with replicas(folder, device_uploads=2) as [replica]:
        device = Device(replica)
        for digest in ("1" * 64, "2" * 64):
            device.create(dataclasses.replace(device.mine, digest=digest))
        refused = no(device.create)
        assert refused == (Reason.TOO_MANY_UPLOADS, grpc.StatusCode.RESOURCE_EXHAUSTED, RETRY_AFTER_S, None)


def test_before_the_disk_is_full_bytes_are_refused_and_all_else_goes_on(folder: Place) -> None:
    with replicas(folder) as [roomy]:
        device = Device(roomy)
        upload = device.create().upload
        small = dataclasses.replace(device.mine, digest=spec.bytes_digest(b"x"), size=1)
        with replicas(folder, disk_reserve_bytes=1 << 60, full_retry_after_s=7) as [full]:
            there = device.at(full)
            for call in (
                there.create,
                lambda: there.append(device.part(upload, 0)),
                lambda: there.stub.Upload(iter([pb.UploadChunk(digest="1" * 64, size=9)]), timeout=5),
            ):
                assert no(call) == (Reason.DISK_FULL, grpc.StatusCode.RESOURCE_EXHAUSTED, 7, None)
            assert no(lambda: there.stub.Submit(pb.SubmitRequest(contribution=small.to_proto(), payload=b"x")))[0] in (
                Reason.DISK_FULL,
                Reason.BAD_PAYLOAD,
            )
            with Connection(full.address) as connection:
                assert connection.status("large").state == "running"
                assert connection.release("large", 4 * BIG.size, 0).release.version == 0
        assert device.append(device.part(upload, 0)) == PART


def test_a_person_who_creates_a_run_hears_at_once_that_there_is_no_room_and_how_much_is_wanted(folder: Place) -> None:
    with (
        replicas(folder, disk_reserve_bytes=1 << 60, full_retry_after_s=30) as [full],
        Connection(full.address, attended=True) as connection,
    ):
        connection.runs()  # as `run create` does first: from now on it is patient
        began = time.monotonic()
        with pytest.raises(Refused, match=r"MB free, 1,152,921,504,612\.8 MB wanted") as caught:
            created(connection, "large", BIG)
    assert caught.value.reason is Reason.DISK_FULL and time.monotonic() - began < 5


@pytest.mark.parametrize(("reserve", "said"), [(1, []), (1 << 60, ["little_room"])])
def test_a_coordinator_says_at_its_start_that_there_is_no_room(reserve: int, said: list[str], folder: Place) -> None:
    heard = dict[str, Any]()

    def hear(event: str, /, **about: Any) -> None:
        heard[event] = about

    async def start() -> None:
        store = folder.open()
        with ThreadPoolExecutor(1) as pool:
            limits = Limits(disk_reserve_bytes=reserve)
            core = Core(store, pool, pool, Bell(), Bell(), Bell(), Meter(), limits=limits, events=hear)
            await warn_of_little_room(core)
        await store.ledger.close()

    asyncio.run(start())
    assert list(heard) == said and all(about["free"] < about["reserve"] == reserve for about in heard.values())


def test_an_upload_that_was_given_up_is_deleted_and_a_device_that_comes_all_the_same_starts_anew(place: Place) -> None:
    with replicas(place, keep_s=0.5) as [replica]:
        device = Device(replica)
        before = kept(replica.store)
        upload = device.create().upload
        device.append(device.part(upload, 0))
        time.sleep(0.7)
        assert asyncio.run(forget_expired(place.open())) == 1
        assert kept(replica.store) == before
        assert no(lambda: device.append(device.part(upload, PART)))[0] is Reason.UNKNOWN_UPLOAD
        with Connection(replica.address) as connection:
            assert connection.send(device.mine, device.payload).digest == device.mine.digest


def test_an_upload_that_was_begun_in_blobs_goes_on_and_ends_in_them(folder: Place) -> None:
    with replicas(folder) as [replica]:
        device = Device(replica)
        before = kept(replica.store)
        upload = device.create().upload
        replica.store.blobs.delete(upload)  # as a process of before blobs grew would have begun it
        for offset in range(0, len(device.payload), PART):
            device.append(device.part(upload, offset))
        assert len(kept(replica.store) - before) == -(-len(device.payload) // PART)
        assert device.commit().digest == device.mine.digest
        assert kept(replica.store) == before | {device.mine.digest}


def test_an_upload_whose_bytes_are_gone_begins_anew(folder: Place) -> None:
    with replicas(folder) as [replica]:
        device = Device(replica)
        replica.store.blobs.delete(device.send_all())
        assert no(device.commit)[:2] == (Reason.UNKNOWN_BLOB, grpc.StatusCode.NOT_FOUND)
        assert device.create().offset == 0
        device.send_all()
        assert device.commit().digest == device.mine.digest


def test_what_a_dead_process_wrote_and_nobody_was_told_of_is_written_over(folder: Place) -> None:
    with replicas(folder, 2) as (first, second):
        device = Device(first)
        upload = device.create().upload
        device.append(device.part(upload, 0))
        with (Path(folder.blobs) / upload[:2] / upload).open("ab") as file:
            file.write(b"x" * (3 * PART))
        for offset in range(PART, len(device.payload), PART):
            device.at((first, second)[offset // PART % 2]).append(device.part(upload, offset))
        assert device.commit().digest == device.mine.digest


def test_a_part_while_another_of_its_upload_is_being_written_is_to_come_again(folder: Place) -> None:
    with replicas(folder) as [replica]:
        device = Device(replica)
        upload = device.create().upload
        with replica.store.blobs.growing(upload):
            assert no(lambda: device.append(device.part(upload, 0)))[:2] == (
                Reason.BUSY,
                grpc.StatusCode.RESOURCE_EXHAUSTED,
            )
        assert device.append(device.part(upload, 0)) == PART


def test_an_upload_that_is_counted_cannot_be_written_to(folder: Place) -> None:
    with replicas(folder) as [replica]:
        device = Device(replica)
        upload = device.send_all()
        device.commit()
        for offset in (0, PART, len(device.payload)):
            assert no(lambda at=offset: device.append(device.part(upload, 0, offset=at)))[0] is Reason.UNKNOWN_UPLOAD
        assert bytes(replica.store.blobs.get(device.mine.digest)) == device.payload


def test_the_name_of_an_upload_opens_no_other_file(folder: Place) -> None:
    with replicas(folder) as [replica]:
        device = Device(replica)
        for name in ("../../ledger.sqlite", replica.store.blobs.put(b"other"), "", "/etc/hostname"):
            assert no(lambda n=name: device.append(device.part(n, 0)))[0] is Reason.UNKNOWN_UPLOAD


def test_a_sweep_spares_what_is_on_its_way(folder: Place) -> None:
    with replicas(folder) as [replica]:
        device = Device(replica)
        upload = device.create().upload
        device.append(device.part(upload, 0))
        orphan = replica.store.blobs.put(b"orphan")
        make_old(folder)
        assert asyncio.run(sweep(folder.open(), 3600.0, dry_run=False)).blobs == 1
        assert orphan not in kept(replica.store)
        for offset in range(PART, len(device.payload), PART):
            device.append(device.part(upload, offset))
        assert device.commit().digest == device.mine.digest


def test_a_sweep_deletes_and_counts_what_was_given_up(folder: Place) -> None:
    with replicas(folder, keep_s=3.0) as [replica]:
        device = Device(replica)
        before = kept(replica.store)
        device.append(device.part(device.create().upload, 0))
        make_old(folder)
        assert asyncio.run(sweep(folder.open(), 3600.0, dry_run=False)).blobs == 0
        time.sleep(3.2)
        assert asyncio.run(sweep(folder.open(), 3600.0, dry_run=True)).blobs == 0
        assert asyncio.run(sweep(folder.open(), 3600.0, dry_run=False)).blobs == 1
        assert kept(replica.store) == before


def make_old(place: Place) -> None:
    for path in Path(place.blobs).glob("??/*"):
        os.utime(path, (0, 0))


def test_other_replicas_are_not_woken_by_parts(postgres_server: Any, s3_server: Any) -> None:
    place = Place.of(postgres_server.fresh(), s3_server.fresh())

    async def woken_while(work: Callable[[], Any]) -> int:
        store, heard = place.open(), list[None]()

        async def listen() -> None:
            async for _ in store.ledger.others():
                heard.append(None)

        listening = asyncio.create_task(listen())
        await asyncio.sleep(0.5)  # until it listens
        await asyncio.to_thread(work)
        await asyncio.sleep(0.5)
        listening.cancel()
        await store.ledger.close()
        return len(heard)

    with replicas(place) as [replica]:
        device = Device(replica)
        assert asyncio.run(woken_while(device.send_all)) == 0
        assert asyncio.run(woken_while(device.commit)) > 0


def test_bytes_in_flight_are_bounded_and_one_part_alone_always_passes() -> None:
    guards = Guards(Limits(in_flight_bytes=100, retry_after_s=3), MemoryBlobs())
    with guards.in_flight(1000), pytest.raises(Refused) as caught, guards.in_flight(1):
        pass
    assert (caught.value.reason, caught.value.retry_after_s) == (Reason.BUSY, 3)
    with guards.in_flight(60), guards.in_flight(40), pytest.raises(Refused), guards.in_flight(1):
        pass
    with guards.in_flight(100):
        pass


def test_streams_and_a_device_s_parts_are_bounded_and_free_again_after() -> None:
    guards = Guards(Limits(streams=1, device_parts=1), MemoryBlobs())
    for _ in range(2):
        with guards.stream(), guards.part_of("d1"), guards.part_of("d2"):
            assert reason_of(lambda: guards.stream().__enter__()) is Reason.BUSY
            assert reason_of(lambda: guards.part_of("d1").__enter__()) is Reason.TOO_MANY_UPLOADS


def honest(replica: Replica, devices: list[tuple[Contribution, bytes]]) -> list[float]:
    """Seconds that each of several devices takes to send its update, four at a time."""

    def send(one: tuple[Contribution, bytes]) -> float:
        with Connection(replica.address) as connection:
            began = time.monotonic()
            connection.send(*one)
            return time.monotonic() - began

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(send, devices))


def test_two_hundred_stalled_uploads_are_not_in_the_way_of_honest_ones(folder: Place) -> None:
    with replicas(folder) as [replica]:
        undisturbed = honest(replica, cohort(replica, "alone"))
        device, release = Device(replica), threading.Event()

        def nothing() -> Iterator[pb.UploadPart]:
            release.wait(60)
            yield from ()

        stalled = [device.stub.AppendUpload.future(nothing(), timeout=60) for _ in range(200)]
        disturbed = honest(replica, cohort(replica, "beside"))
        began = time.monotonic()
        answer = health_pb2_grpc.HealthStub(device.channel).Check(health_pb2.HealthCheckRequest(), timeout=5)
        answered_s = time.monotonic() - began
        assert not any(call.done() for call in stalled)
        release.set()
        for call in stalled:
            call.cancel()
    assert answer.status == health_pb2.HealthCheckResponse.SERVING and answered_s < 1
    print(f"slowest of 20: {max(undisturbed):.3f} s alone, {max(disturbed):.3f} s beside 200 stalled")
    assert max(disturbed) < 2 * max(undisturbed) + 1.0  # the second is this machine's, shared with others


def cohort(replica: Replica, name: str) -> list[tuple[Contribution, bytes]]:
    """The updates of 20 devices of one round, each with a task."""
    run = make(name, cohort={"goal": 20})
    with Connection(replica.address) as connection:
        connection.create_run(run, MIDDLE, np.zeros(MIDDLE.size, np.float32))
        tasks = {f"d{n}": connection.check_in(f"d{n}", (name,), 1.0) for n in range(20)}
    chain, updates = run.chain(), []
    assert chain is not None
    task = next(iter(tasks.values()))
    assert isinstance(task, Task)
    _, payload = update(run, task, MIDDLE)
    for device in tasks:
        mine = Contribution(
            device, name, 1, 1, spec.bytes_digest(payload), len(payload), 5, BASE, task.release_digest, Metrics()
        )
        updates.append((mine, payload))
    return updates
