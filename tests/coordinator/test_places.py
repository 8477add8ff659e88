"""Where a store is, as the command line says it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.stores import Place, without_secrets
from edge_client.state import DeviceState
from tests.processes import edgetune
from wire.errors import UserError


def test_a_folder_keeps_its_blobs_in_itself_unless_told_otherwise() -> None:
    assert Place.of("/srv/store", None) == Place("/srv/store", "/srv/store/blobs")
    assert Place.of("/srv/store", "s3://bucket/prefix").blobs == "s3://bucket/prefix"


@pytest.mark.parametrize(
    ("ledger", "blobs", "said"),
    [
        ("postgresql://db/x", None, "--blobs is missing"),
        ("mysql://ann:hidden@db/x", None, "--store mysql://…: choose a folder, or a URL: postgresql://…"),
        ("sqlite:///x", None, "--store sqlite://…"),
        ("x", "memory://", "--blobs memory://…: choose a folder, or a URL: s3://…"),
        ("x", "gs://bucket", "--blobs gs://…"),
    ],
)
def test_a_url_that_names_no_row_is_refused_and_what_would_do_is_said(
    ledger: str, blobs: str | None, said: str
) -> None:
    with pytest.raises(UserError) as caught:
        Place.of(ledger, blobs)
    assert said in str(caught.value) and "hidden" not in str(caught.value)


@pytest.mark.parametrize(
    ("place", "shown"),
    [
        ("/srv/a@b:c", "/srv/a@b:c"),
        ("postgresql://ann:hidden@db:5432/x?sslmode=require", "postgresql://ann@db:5432/x"),
        ("postgresql://db/x?password=hidden", "postgresql://db/x"),
        ("postgresql://ann:hid@hidden@db/x", "postgresql://…"),
        ("postgresql://ann:hid?hidden@db/x", "postgresql://…"),
        ("s3://bucket/prefix?endpoint=http://h", "s3://bucket/prefix"),
    ],
)
def test_a_place_is_shown_without_secrets(place: str, shown: str) -> None:
    assert without_secrets(place) == shown


def test_what_a_store_or_a_device_keeps_is_for_its_owner_alone(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        store = Place.of(str(tmp_path / "deep" / "store"), str(tmp_path / "blobs")).open()
        store.blobs.put(b"update")
        store.blobs.grow("a" * 32)
        DeviceState(tmp_path / "device", "d1").close()
        stored = [path for name in ("deep", "blobs") for path in (tmp_path / name, *(tmp_path / name).rglob("*"))]
        loose = [path for path in (*stored, tmp_path / "device") if path.stat().st_mode & 0o077]
        asyncio.run(store.ledger.close())
    finally:
        os.umask(before)
    assert {"ledger.sqlite", "ledger.sqlite-wal", "a" * 32} <= {path.name for path in stored}
    assert not loose


def test_a_command_that_fails_shows_no_password() -> None:
    line = ["--store", "postgresql://ann:hidden@127.0.0.1:1/x", "--blobs", "b"]
    for command in (["coordinator", "serve"], ["coordinator", "gc"], ["run", "verify", "x"]):
        result = edgetune(*command, *line)
        assert result.returncode == 1 and "postgresql://ann@127.0.0.1:1/x: cannot keep a ledger here" in result.stderr
        assert "hidden" not in result.stderr + result.stdout and len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("place", "package", "extra"),
    [
        (["--store", "postgresql://db/x", "--blobs", "b"], "psycopg", "postgres"),
        (["--store", "s", "--blobs", "s3://bucket/prefix"], "obstore", "s3"),
    ],
)
def test_a_row_whose_package_is_absent_says_what_installs_it(
    place: list[str], package: str, extra: str, tmp_path: Path
) -> None:
    without = (
        f"import sys; sys.modules[{package!r}] = None; from edgetune.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    line = [sys.executable, "-c", without, "coordinator", "serve", *place]
    result = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
    assert result.returncode == 2
    assert f"{package} is not installed: pip install 'edgetune[{extra}]'" in result.stderr
