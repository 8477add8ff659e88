"""A link is as fast, as late and as broken as it is told to be, and counts what passes."""

from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from experiments.link import Bucket, Link, Rates

FAST = 1e9


@pytest.fixture
def echo() -> Iterator[str]:
    """The address of a server that sends back what it gets."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"


def serve(listener: socket.socket) -> None:
    for _ in itertools.count():
        try:
            near, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=answer, args=(near,), daemon=True).start()


def answer(near: socket.socket) -> None:
    with near:
        while data := near.recv(1 << 16):
            near.sendall(data)


def there_and_back(link: Link, data: bytes) -> float:
    """Seconds for all of `data`."""
    host, port = link.address.split(":")
    began = time.monotonic()
    with socket.create_connection((host, int(port))) as near:
        threading.Thread(target=near.sendall, args=(data,), daemon=True).start()
        arrived = b""
        while len(arrived) < len(data):
            arrived += near.recv(1 << 16)
    assert arrived == data
    return time.monotonic() - began


def ended(near: socket.socket) -> bool:
    """Whether a connection on which nothing was asked ends within the timeout."""
    try:
        return near.recv(1) == b""
    except ConnectionResetError:
        return True


def test_a_bucket_passes_a_burst_at_once_and_then_its_rate() -> None:
    bucket, passed = Bucket(bytes_s=100.0, burst=50).take(50, now=10.0)
    assert passed == 10.0
    bucket, passed = bucket.take(100, now=10.0)
    assert passed == 11.0
    bucket, passed = bucket.take(100, now=11.0)
    assert passed == 12.0


def test_a_bucket_fills_up_to_its_burst_and_no_further() -> None:
    bucket, _ = Bucket(bytes_s=100.0, burst=50).take(500, now=0.0)
    _, passed = bucket.take(80, now=1000.0)
    assert passed == pytest.approx(1000.3)


def test_pieces_pass_as_late_as_the_whole() -> None:
    bucket, now = Bucket(bytes_s=100.0, burst=50), 0.0
    for _ in range(40):
        bucket, now = bucket.take(10, now)
    assert now == pytest.approx((400 - 50) / 100)


def test_every_byte_arrives_at_the_rate_and_is_counted(echo: str) -> None:
    data = bytes(range(256)) * 1500
    with Link(echo, Rates(up=4e6, down=FAST)) as link:
        took = there_and_back(link, data)
        assert (link.bytes_up, link.bytes_down) == (len(data), len(data))
    expected = (len(data) - 65536) * 8 / 4e6
    assert expected <= took < expected + 1.0


def test_an_answer_takes_a_round_trip_and_the_handshake_another(echo: str) -> None:
    with Link(echo, Rates(FAST, FAST, round_trip_s=0.2)) as link:
        assert 0.4 <= there_and_back(link, b"x") < 1.0


def test_connections_are_cut_and_new_ones_served(echo: str) -> None:
    with Link(echo, Rates(FAST, FAST, cut_every_s=0.2), seed=1) as link:
        host, port = link.address.split(":")
        with socket.create_connection((host, int(port))) as near:
            near.settimeout(20)
            assert ended(near)
        assert link.cuts >= 1
        assert there_and_back(link, b"again") < 5.0


def test_a_link_whose_other_end_is_gone_closes_its_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        nobody = f"127.0.0.1:{listener.getsockname()[1]}"
    with (
        Link(nobody, Rates(FAST, FAST)) as link,
        socket.create_connection(("127.0.0.1", int(link.address.split(":")[1]))) as near,
    ):
        near.settimeout(20)
        assert near.recv(1) == b""


def test_a_link_without_a_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="rates above 0"):
        Rates(up=0.0, down=1.0)
