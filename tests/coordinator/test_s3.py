"""Blobs in a bucket: what other servers than the usual one do, and what a large blob costs. Real HTTP throughout."""

from __future__ import annotations

import datetime
import hashlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.servers import S3, s3_url
from wire.errors import MachineError, Reason, Refused, StoreError, UserError

s3 = pytest.importorskip("coordinator.stores.s3", reason="obstore is not installed")
MIB = 1 << 20


class Odd(BaseHTTPRequestHandler):
    """A server with a mind of its own: `puts` answers each PUT of a blob in turn, the last for ever."""

    puts: list[int]
    seen: list[str | None]
    there: dict[str, int]
    size = 0

    def do_PUT(self) -> None:
        left = int(self.headers["content-length"])
        while left:
            left -= len(self.rfile.read(min(left, MIB)))
        if self.path.endswith("/probe"):
            status = 412 if self.path in self.there else 200
        else:
            self.seen.append(self.headers["if-none-match"])
            status = self.puts.pop(0) if len(self.puts) > 1 else self.puts[0]
        if status == 200:
            self.there[self.path] = int(self.headers["content-length"])
        self._answer(status)

    def do_HEAD(self) -> None:
        size = self.there.get(self.path)
        self._answer(404 if size is None else 200, size or 0)

    def do_GET(self) -> None:
        self._answer(200, self.size)
        for _ in range(self.size // MIB):
            self.wfile.write(bytes(MIB))

    def _answer(self, status: int, length: int = 0) -> None:
        self.send_response(status)
        self.send_header("content-length", str(length))
        self.send_header("etag", '"x"')
        self.send_header("last-modified", "Tue, 24 Nov 2026 00:00:00 GMT")
        self.end_headers()

    def log_message(self, *ignored: object) -> None:
        pass


@contextmanager
def odd(*puts: int, **more: object) -> Iterator[tuple[str, type[Odd]]]:
    handler = type("Handler", (Odd,), {"puts": list(puts), "seen": [], "there": {}, **more})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield s3_url(f"127.0.0.1:{server.server_port}", "odd"), handler
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in S3.environment.items():
        monkeypatch.setenv(name, value)


def test_a_server_that_ignores_create_only_puts_is_refused_before_anything_is_served() -> None:
    class Careless(dict[str, int]):
        def __contains__(self, path: object) -> bool:
            return False

    with odd(200, there=Careless()) as (url, _), pytest.raises(MachineError, match="ignores create-only puts"):
        s3.S3Blobs(url)


def test_every_blob_is_put_create_only() -> None:
    with odd(200) as (url, server):
        s3.S3Blobs(url).put(b"data")
    assert server.seen == ["*"]


@pytest.mark.parametrize("first", [409, 412])
def test_a_conflict_with_nothing_there_yet_is_tried_again(first: int) -> None:
    with odd(first, first, 200) as (url, server):
        assert s3.S3Blobs(url).put(b"data") == hashlib.sha256(b"data").hexdigest()
        assert len(server.seen) == 3 and len(server.there) == 2  # the probe is there too


def test_a_conflict_with_the_same_blob_is_done() -> None:
    digest = hashlib.sha256(b"data").hexdigest()
    with odd(200, 409) as (url, server):
        blobs = s3.S3Blobs(url)
        assert blobs.put(b"data") == digest
        server.puts[:] = [409, 200]  # refused, found to be there and old: renewed by a put of the same bytes
        assert blobs.put(b"data") == digest
    assert server.seen == ["*", "*", None]


def test_conflict_after_conflict_is_said_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "TRIES", 2)
    with odd(409) as (url, _), pytest.raises(Refused, match="conflict") as caught:
        s3.S3Blobs(url).put(b"data")
    assert caught.value.reason is Reason.BUSY


def test_a_blob_of_another_length_under_its_name_is_damage() -> None:
    with odd(200, 409) as (url, server):
        blobs = s3.S3Blobs(url)
        blobs.put(b"data")
        server.there = {path: size + 1 for path, size in server.there.items()}
        with pytest.raises(StoreError, match="5 bytes, not 4"):
            blobs.put(b"data")


def test_a_blob_that_was_changed_is_found_when_it_is_read(s3_server: S3) -> None:
    blobs = s3.S3Blobs(s3_server.fresh())
    digest = blobs.put(b"data")
    blobs._put(digest, b"tada", mode="overwrite")
    with pytest.raises(StoreError, match="damaged"):
        blobs.get(digest)


def test_a_server_that_goes_away_is_busy_and_one_that_never_was_is_an_error_of_this_machine() -> None:
    with odd(200) as (url, _):
        blobs = s3.S3Blobs(url)
    for call in (lambda: blobs.put(b"x"), lambda: blobs.get("0" * 64), lambda: list(blobs.digests())):
        with pytest.raises(Refused, match="does not answer") as caught:
            call()
        assert caught.value.reason is Reason.BUSY
    with pytest.raises(MachineError, match="cannot keep blobs here"):
        s3.S3Blobs(url)


def test_http_is_spoken_only_where_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with odd(200) as (url, _):
        plain = url.replace("&allow_http=true", "")
        with pytest.raises(UserError, match=r"http://127\.0\.0\.1:\d+ has no TLS; .*AWS_ALLOW_HTTP=true"):
            s3.S3Blobs(plain)
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        s3.S3Blobs(plain)


def test_credentials_that_are_not_set_are_named_where_a_bucket_cannot_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setattr(s3, "TRY_FOR", datetime.timedelta(seconds=0.1))
    with odd(403) as (url, _), pytest.raises(UserError, match=r"\(not set: AWS_SECRET_ACCESS_KEY\)"):
        s3.S3Blobs(url)


def test_a_bucket_that_does_not_exist_is_said(s3_server: S3) -> None:
    with pytest.raises(MachineError, match="no such bucket"):
        s3.S3Blobs(s3_server.fresh().replace("s3://bucket", "s3://nowhere"))


@pytest.mark.parametrize("url", ["s3://bucket/p?secret_access_key=hidden", "s3://key:hidden@bucket/p", "s3:///p"])
def test_a_url_with_secrets_or_without_a_bucket_is_refused_and_not_quoted(url: str) -> None:
    with pytest.raises(UserError) as caught:
        s3.S3Blobs(url)
    assert "hidden" not in str(caught.value)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_large_blob_is_never_in_memory_as_a_whole_on_its_way_in_or_out() -> None:
    size = 96 * MIB
    zeros = hashlib.sha256()
    for _ in range(size // MIB):
        zeros.update(bytes(MIB))

    def write() -> None:
        with blobs.writer(zeros.hexdigest(), size) as writer:
            for _ in range(size // MIB):
                writer.write(bytes(MIB))
            writer.commit()

    with odd(200, size=size) as (url, _):
        blobs = s3.S3Blobs(url)
        assert grown(write) < 24 * MIB
        assert grown(lambda: len(blobs.get(zeros.hexdigest()))) < 24 * MIB


def grown(work: Callable[[], object]) -> int:
    """By how many bytes this process's own memory was larger at any time while `work` ran; what is mapped is not its own."""
    before, peak, done = own_bytes(), [0], threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], own_bytes())

    watching = threading.Thread(target=look)
    watching.start()
    try:
        work()
    finally:
        done.set()
        watching.join()
    return max(peak[0], own_bytes()) - before


def own_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
