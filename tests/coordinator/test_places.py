"""Where a store is, as the command line says it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from coordinator.stores import Place, without_secrets
from edge_client.state import DeviceState
from tests.processes import CoordinatorProcess, edgetune
from tests.servers import Postgres
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


def test_a_database_of_another_program_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE recipes (name TEXT)")
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"ledger\.sqlite: a database of another program"):
        Place.of(str(tmp_path), None).open()
    assert path.read_bytes() == before


@pytest.mark.parametrize("damage", ["head", "middle"])
def test_a_damaged_ledger_is_named_before_a_coordinator_listens(damage: str, tmp_path: Path) -> None:
    asyncio.run(Place.of(str(tmp_path), None).open().ledger.close())
    path = tmp_path / "ledger.sqlite"
    data = bytearray(path.read_bytes())
    start = 0 if damage == "head" else 4096
    data[start : start + 2048] = b"\xff" * 2048
    path.write_bytes(data)
    done = edgetune("coordinator", "serve", "--store", tmp_path, "--listen", "127.0.0.1:0", "--json")
    assert done.returncode == 1 and str(path) in done.stderr
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()] == ["ended"]


def test_what_ends_a_coordinator_is_json_where_all_else_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    serve = ("coordinator", "serve", "--store", tmp_path / "file", "--listen", "127.0.0.1:0", "--log-format", "json")
    alone, together = edgetune(*serve), edgetune(*serve, "--replicas", "2", "--json")
    for done in (alone, together):
        [line] = map(json.loads, done.stderr.splitlines())
        assert done.returncode == 1 and line["event"] == "ended" and str(tmp_path / "file") in line["error"]
    assert json.loads(together.stdout) == {"event": "ended", "error": line["error"]} and not alone.stdout


@pytest.mark.parametrize("option", [("--enroll", "127.0.0.1:0"), ("--certificates", "1d")])
def test_options_for_devices_certificates_are_refused_without_identities(
    option: tuple[str, str], tmp_path: Path
) -> None:
    done = edgetune("coordinator", "serve", "--store", tmp_path, "--listen", "127.0.0.1:0", *option)
    assert done.returncode == 2 and f"{option[0]}: this coordinator has no identities" in done.stderr


def test_blobs_in_a_folder_beside_a_shared_ledger_are_pointed_at(tmp_path: Path, postgres_server: Postgres) -> None:
    with CoordinatorProcess(postgres_server.fresh(), "127.0.0.1:0", "--blobs", str(tmp_path)) as coordinator:
        assert coordinator.event("blobs_here")["blobs"] == str(tmp_path)
