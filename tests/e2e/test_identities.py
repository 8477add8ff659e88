"""Federations of devices with identities, by the commands that people type, over real TLS."""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from edge_client.identity import Identity
from tests.processes import (
    CoordinatorProcess,
    administrator,
    edgetune,
    finished,
    identified,
    start_client,
    write_texts,
    write_toy_spec,
)


def create(coordinator: CoordinatorProcess, folder: Path, **changes: object) -> None:
    done = edgetune("run", "create", write_toy_spec(folder / "spec.toml", **changes), *coordinator.admin)
    assert done.returncode == 0, done.stderr


def enroll(coordinator: CoordinatorProcess, folder: Path, name: str, owner: str = "ann") -> Path:
    """A device's state, enrolled."""
    invited = edgetune("coordinator", "invite", "--owner", owner, "--json", *coordinator.admin)
    assert invited.returncode == 0, invited.stderr
    text = json.loads(invited.stdout)["invitation"]
    done = edgetune("client", "enroll", text, "--state", folder / name, "--name", name)
    assert done.returncode == 0, done.stderr
    return folder / name


def join(coordinator: CoordinatorProcess, folder: Path, name: str) -> Any:
    data = write_texts(folder / f"{name}.jsonl", name)
    return start_client(coordinator.address, data, folder / name, name=name)


@pytest.fixture
def coordinator(tmp_path: Path) -> Iterator[CoordinatorProcess]:
    with identified(tmp_path / "store") as process:
        yield process


def test_from_init_to_a_verified_and_signed_run(tmp_path: Path) -> None:
    store = tmp_path / "store"
    made = edgetune("coordinator", "init", "--dir", store / "identity", "--host", "localhost", "--json")
    assert made.returncode == 0, made.stderr
    with CoordinatorProcess(store) as coordinator:
        create(coordinator, tmp_path, goal=2, codec="int8")
        for name in ("d-one", "d-two"):
            enroll(coordinator, tmp_path, name)
        told = finished([join(coordinator, tmp_path, name) for name in ("d-one", "d-two")])
        listed = edgetune("coordinator", "devices", "--json", *coordinator.admin)
        status = edgetune("run", "status", "toy", "--json", *coordinator.admin)
        revoked = edgetune("coordinator", "revoke", "d-one", "--json", *coordinator.admin)
        stranger = edgetune("run", "status", "toy", "--coordinator", coordinator.address, "--insecure")
        lost = edgetune("run", "status", "toy", "--coordinator", coordinator.address, "--identity", tmp_path)
    assert [device["name"] for device in json.loads(listed.stdout)] == ["d-one", "d-two"]
    assert json.loads(status.stdout)["state"] == "done"
    assert json.loads(revoked.stdout)["state"] == "revoked"
    assert stranger.returncode == 1 and "identities" in stranger.stderr
    assert lost.returncode == 2 and "no identity here" in lost.stderr
    assert all([e["kind"] for e in events if e["event"] == "submitted"][-1] == "evaluate" for events in told)
    verified = edgetune("run", "verify", "toy", "--store", store, "--json")
    assert verified.returncode == 0
    assert json.loads(verified.stdout)["signed"] is True


def test_a_device_revoked_in_the_middle_of_a_run_ends_and_the_run_goes_on(
    coordinator: CoordinatorProcess, tmp_path: Path
) -> None:
    create(coordinator, tmp_path, goal=2, rounds=2, local_steps=400, learning_rate=0.0003, deadline_s=5.0)
    for name in ("good", "bad"):
        enroll(coordinator, tmp_path, name)
    good, bad = (join(coordinator, tmp_path, name) for name in ("good", "bad"))
    with administrator(coordinator) as admin:
        next(s for s in admin.watch("toy") if s.round >= 2)
        admin.revoke("bad")
        revoked_at = time.monotonic()
        _, err = bad.communicate(timeout=30)
        assert time.monotonic() - revoked_at < 6
        assert bad.returncode == 1 and "revoked" in err and "Traceback" not in err
        finished([good])
        status = admin.status("toy")
    assert status.state == "done" and status.releases[-1].contributions == 1
    assert edgetune("run", "verify", "toy", "--store", coordinator.store).returncode == 0


def test_a_certificate_of_seconds_is_renewed_again_and_again_while_the_client_runs(tmp_path: Path) -> None:
    with identified(tmp_path / "store", "--certificates", "8s") as coordinator:  # a client takes seconds to start
        create(coordinator, tmp_path, goal=1, rounds=1000, local_steps=500, learning_rate=0.0002)
        state = enroll(coordinator, tmp_path, "d")
        first = Identity.read(state / "identity").certificate
        with ThreadPoolExecutor(1) as pool, administrator(coordinator) as admin:
            ended = pool.submit(finished, [join(coordinator, tmp_path, "d")])
            while (last := Identity.read(state / "identity").certificate).not_after < first.not_after + 8:
                assert not ended.done(), "it ended before its first certificate had"
                time.sleep(0.2)
            admin.control("toy", "stop")
            ended.result()
    assert last.key == first.key


def test_an_expired_device_is_told_what_to_do_and_comes_back_as_itself(tmp_path: Path) -> None:
    with identified(tmp_path / "store", "--certificates", "1s") as coordinator:
        enroll(coordinator, tmp_path, "d")
    with identified(tmp_path / "store") as coordinator:
        create(coordinator, tmp_path, goal=1, rounds=1)
        time.sleep(1.0)
        late = join(coordinator, tmp_path, "d")
        _, err = late.communicate(timeout=30)
        assert late.returncode == 2 and "expired" in err and "new invitation" in err
        enroll(coordinator, tmp_path, "d")
        finished([join(coordinator, tmp_path, "d")])


def test_a_run_that_was_created_without_identities_is_refused_as_unsigned(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "store") as plain:
        done = edgetune("run", "create", write_toy_spec(tmp_path / "s.toml", goal=1), "--coordinator", plain.address)
        assert done.returncode == 0
    with identified(tmp_path / "store") as coordinator:
        enroll(coordinator, tmp_path, "d")
        client = join(coordinator, tmp_path, "d")
        _, err = client.communicate(timeout=30)
    assert client.returncode == 1 and "not signed" in err and "Traceback" not in err
    verified = edgetune("run", "verify", "toy", "--store", tmp_path / "store", "--json")
    assert json.loads(verified.stdout)["signed"] is False


def test_a_signature_that_is_not_the_coordinators_is_refused_by_devices_and_found_by_verify(tmp_path: Path) -> None:
    with identified(tmp_path / "store") as coordinator:
        create(coordinator, tmp_path, goal=1)
        enroll(coordinator, tmp_path, "d")
    with sqlite3.connect(tmp_path / "store" / "ledger.sqlite") as db:
        db.execute("UPDATE release_signatures SET signature = ?", ("ab" * 64,))
    with identified(tmp_path / "store") as coordinator:
        client = join(coordinator, tmp_path, "d")
        _, err = client.communicate(timeout=30)
        exported = edgetune("run", "export", "toy", tmp_path / "out", "--to", "peft", *coordinator.admin)
    for code, said in ((client.returncode, err), (exported.returncode, exported.stderr)):
        assert code == 1 and "not the coordinator's" in said and "Traceback" not in said
    verified = edgetune("run", "verify", "toy", "--store", tmp_path / "store")
    assert verified.returncode == 1 and "signature is not the coordinator's" in verified.stdout


def test_a_coordinator_that_goes_back_is_refused_until_the_run_is_forgotten(
    coordinator: CoordinatorProcess, tmp_path: Path
) -> None:
    create(coordinator, tmp_path, goal=1)
    state = enroll(coordinator, tmp_path, "d")
    (state / "runs" / "toy").mkdir(parents=True)
    (state / "runs" / "toy" / "newest.json").write_text("3")
    client = join(coordinator, tmp_path, "d")
    _, err = client.communicate(timeout=30)
    assert client.returncode == 1 and "goes back" in err and "Traceback" not in err
    assert edgetune("client", "leave", "--run", "toy", "--state", state).returncode == 0
    finished([join(coordinator, tmp_path, "d")])
    assert json.loads((state / "runs" / "toy" / "newest.json").read_text()) == 3


def test_a_client_without_identity_does_not_leave_this_machine(tmp_path: Path) -> None:
    data = write_texts(tmp_path / "a.jsonl", "alpha")
    far = ["--coordinator", "192.0.2.7:7443"]
    joined = edgetune("client", "join", *far, "--data", data, "--state", tmp_path / "s")
    assert joined.returncode == 2 and "client enroll" in joined.stderr
    status = edgetune("run", "status", "toy", *far, "--identity", tmp_path / "none")
    assert status.returncode == 2 and "--identity" in status.stderr


def test_an_invitation_can_be_drawn_for_a_camera(coordinator: CoordinatorProcess) -> None:
    drawn = edgetune("coordinator", "invite", "--qr", *coordinator.admin)
    assert drawn.returncode == 0 and "█" in drawn.stdout
    assert drawn.stdout.startswith("edgetune://127.0.0.1:")


@pytest.mark.parametrize("text", ["", "edgetune://127.0.0.1:7444", "https://example.org"])
def test_what_is_no_invitation_is_said_before_anything_is_written(tmp_path: Path, text: str) -> None:
    done = edgetune("client", "enroll", text, "--state", tmp_path / "d")
    assert done.returncode == 2 and "paste the whole" in done.stderr and not (tmp_path / "d").exists()
