"""An identity folder that somebody has had their hands in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from coordinator import authority
from coordinator.authority import Authority
from edge_client.identity import Identity
from tests.processes import edgetune
from wire.errors import IdentityError, MachineError

KEYS = ("ca.key", "release.key", "enrolment.key")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return authority.create(tmp_path / "identity", ["localhost"]).folder


@pytest.mark.parametrize("name", [*KEYS, "ca.pem", "enrolment.pem"])
def test_a_damaged_file_is_named(name: str, folder: Path) -> None:
    (folder / name).write_text("junk")
    with pytest.raises(IdentityError, match=f"{name}: "):
        Authority(folder)


@pytest.mark.parametrize(("taken", "named"), [("ca.pem", "ca.key"), ("ca.key", "ca.key"), ("enrolment.key", None)])
def test_a_file_of_another_authority_is_named(taken: str, named: str | None, folder: Path, tmp_path: Path) -> None:
    other = authority.create(tmp_path / "other", ["localhost"]).folder
    shutil.copy(other / taken, folder / taken)
    with pytest.raises(IdentityError, match=f"{named or taken}: the key is not that"):
        Authority(folder)


def test_an_enrolment_certificate_of_another_authority_is_named(folder: Path, tmp_path: Path) -> None:
    other = authority.create(tmp_path / "other", ["localhost"]).folder
    for name in ("enrolment.key", "enrolment.pem"):
        shutil.copy(other / name, folder / name)
    with pytest.raises(IdentityError, match=r"enrolment\.pem: not a certificate of the authority"):
        Authority(folder)


@pytest.mark.parametrize("hosts", ["", "bad!host"])
def test_hosts_that_are_none_are_said(hosts: str, folder: Path) -> None:
    (folder / "hosts").write_text(hosts)
    with pytest.raises(IdentityError, match="hosts: "):
        Authority(folder)


@pytest.mark.parametrize("name", KEYS)
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604])
def test_a_key_that_others_can_read_is_refused(mode: int, name: str, folder: Path) -> None:
    (folder / name).chmod(mode)
    with pytest.raises(IdentityError, match=rf"{name}: others can read this key \(mode {mode:04o}\)"):
        Authority(folder)


def test_an_administrator_s_key_that_others_can_read_is_refused(folder: Path) -> None:
    Identity.read(folder / "admin")
    (folder / "admin" / "key.pem").chmod(0o644)
    with pytest.raises(IdentityError, match=r"key\.pem: others can read"):
        Identity.read(folder / "admin")


def test_a_coordinator_of_such_a_folder_does_not_start(folder: Path) -> None:
    (folder / "ca.key").write_text("junk")
    done = edgetune("coordinator", "serve", "--store", folder.parent / "store", "--identity", folder)
    assert done.returncode == 2 and "ca.key: a private key is damaged" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_folder_that_could_not_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(folder: Path, hosts: object) -> None:
        (folder / "ca.key").write_text("half")
        raise OSError(28, "no space")

    monkeypatch.setattr(authority, "_fill", fails)
    with pytest.raises(MachineError, match="no space"):
        authority.create(tmp_path / "identity", ["localhost"])
    assert not list(tmp_path.iterdir())
