"""What a coordinator shows of itself, scraped from a real process."""

from __future__ import annotations

import contextlib
import importlib.util
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pytest
from prometheus_client.parser import text_string_to_metric_families

from coordinator.meter import BOUNDS_S, Times
from edge_client.transport import Connection
from edgetune.cli import main
from tests.processes import CoordinatorProcess, edgetune
from tests.servers import free_ports
from tests.updates import BIG, created, named, update
from wire.errors import Reason, Refused
from wire.messages import Task


def free_pair() -> int:
    """A free port whose next one is free, too."""
    while True:
        [first] = free_ports(1)
        with socket.socket() as held, contextlib.suppress(OSError):
            held.bind(("127.0.0.1", first + 1))
            return first


@pytest.fixture(scope="module")
def port() -> int:
    return free_ports(1)[0]


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory, port: int) -> Iterator[CoordinatorProcess]:
    store = tmp_path_factory.mktemp("store")
    with CoordinatorProcess(store, "127.0.0.1:0", "--metrics", str(port)) as process:
        yield process


def scraped(port: int) -> dict[tuple[str, str], float]:
    """(sample, value of its first label) → number."""
    with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        families = text_string_to_metric_families(answer.read().decode())
        return {(s.name, next(iter(s.labels.values()), "")): s.value for family in families for s in family.samples}


def test_rounds_accepts_refusals_bytes_and_times_are_counted(coordinator: CoordinatorProcess, port: int) -> None:
    with Connection(coordinator.address) as connection:
        run, task = created(connection, "counted", BIG)
        contribution, payload = update(run, task, BIG)
        with pytest.raises(Refused):
            connection.send(named(task, payload[:8]), payload[:8])
        for _ in range(2):
            connection.send(contribution, payload)
        assert isinstance(connection.check_in("d1", ("counted",), 10.0), Task)
        connection.release("counted", len(payload), 1)
    seen = scraped(port)
    assert seen["edgetune_rounds", "published"] == 1 and seen["edgetune_rounds", "open"] == 1
    assert seen["edgetune_accepts_total", ""] == 1, "the same update again is not another one"
    assert seen["edgetune_refusals_total", Reason.BAD_PAYLOAD.value] == 1
    assert seen["edgetune_received_bytes_total", ""] > len(payload)
    assert seen["edgetune_sent_bytes_total", ""] > 4 * BIG.size
    assert seen["edgetune_uploads", ""] == 0
    assert seen["edgetune_combine_seconds_count", ""] == 1 and seen["edgetune_combine_seconds_sum", ""] > 0
    assert seen["edgetune_ledger_seconds_count", "accept"] >= 1


def test_no_name_that_a_caller_chooses_becomes_a_label(coordinator: CoordinatorProcess, port: int) -> None:
    with Connection(coordinator.address) as connection:
        created(connection, "kept-private")
        for n in range(30):
            with pytest.raises(Refused):
                connection.check_in(f"hostile-{n}", (f"nowhere-{n}",), 0.0)
    labels = {label for _, label in scraped(port)}
    assert not [label for label in labels if "hostile" in label or "nowhere" in label or "private" in label]
    assert scraped(port)["edgetune_refusals_total", Reason.UNKNOWN_RUN.value] >= 30


def test_an_upload_under_way_is_seen_and_gone_when_it_ends(coordinator: CoordinatorProcess, port: int) -> None:
    import grpc

    from protos.v1 import federation_pb2 as pb
    from protos.v1 import federation_pb2_grpc as pb_grpc

    def stalled() -> Iterator[pb.UploadChunk]:
        yield pb.UploadChunk(digest="0" * 64, size=100, data=b"x")
        time.sleep(20)

    def until(count: float) -> None:
        deadline = time.monotonic() + 10
        while scraped(port)["edgetune_uploads", ""] != count:
            assert time.monotonic() < deadline
            time.sleep(0.1)

    with grpc.insecure_channel(coordinator.address) as channel:
        call = pb_grpc.FederationStub(channel).Upload.future(stalled(), timeout=30)  # type: ignore[no-untyped-call]
        until(1)
        call.cancel()
        until(0)


def test_each_replica_shows_its_own_numbers_a_port_higher(tmp_path: Path) -> None:
    first = free_pair()
    with CoordinatorProcess(tmp_path, "127.0.0.1:0", "--metrics", f"127.0.0.1:{first}", "--replicas", "2") as together:
        assert together.event("metrics")["address"] == f"127.0.0.1:{first}"
        for port in (first, first + 1):
            assert ("edgetune_accepts_total", "") in scraped(port)


def test_an_address_that_is_taken_or_none_is_one_clear_line(
    coordinator: CoordinatorProcess, port: int, tmp_path: Path
) -> None:
    taken = edgetune("coordinator", "serve", "--store", tmp_path, "--listen", "127.0.0.1:0", "--metrics", str(port))
    assert taken.returncode == 1 and "cannot show metrics" in taken.stderr and len(taken.stderr.splitlines()) == 1
    wrong = edgetune("coordinator", "serve", "--store", tmp_path, "--metrics", "here")
    assert wrong.returncode == 2 and "HOST:PORT" in wrong.stderr


def test_a_missing_library_is_said_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["coordinator", "serve", "--store", str(tmp_path), "--metrics", "9464"]) == 2
    assert "edgetune[metrics]" in capsys.readouterr().err


def test_times_are_counted_up_to_each_bound() -> None:
    times = Times()
    for seconds in (0.0005, 0.001, 0.002, 100.0):
        times.took(seconds)
    assert times.counts == [2, 1, *[0] * (len(BOUNDS_S) - 2), 1]
    assert times.sum_s == pytest.approx(100.0035)
