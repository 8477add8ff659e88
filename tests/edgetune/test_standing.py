"""What people see of a run: all of it in 80 columns, and a live view no higher than its screen."""

from __future__ import annotations

import dataclasses
import io
import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from coordinator import authority
from edge_client.transport import Connection
from edgetune import standing
from tests.processes import CoordinatorProcess, command, edgetune, environment, write_toy_spec
from tests.updates import created, named, update
from wire.messages import ReleaseStatus, RunStatus, Task

RELEASE = ReleaseStatus(0, "ab" * 32, 1000, 1e9, 12.3456, 10, 2.1, 2.0, 123_456_789_012, 987_654_321)


def release(version: int, loss: float | None = 12.3456) -> ReleaseStatus:
    return dataclasses.replace(RELEASE, version=version, held_out_loss=loss)


def status(releases: int = 3, **changes: Any) -> RunStatus:
    made = RunStatus(
        "speeches", "running", 3, 8, 1, "train", 10, 5, 12, 4, time.time() + 40, 5120, "s" * 64, "b" * 64, {},
        tuple(release(version) for version in range(releases)),
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def drawn(what: Any, width: int = 80, height: int = 24) -> list[str]:
    console = Console(file=io.StringIO(), width=width, height=height)
    console.print(what)
    assert isinstance(console.file, io.StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_a_table_of_releases_is_whole_in_80_columns() -> None:
    lines = drawn(standing.releases([release(999), release(1000, None)]))
    assert all(len(line) <= 80 and "…" not in line for line in lines)
    assert all(column in lines[0] for column in standing.COLUMNS)
    for value in ("999", "abababab", "1000", "12.3456", "229946.05", "123.5 GB", "987.7 MB"):
        assert value in lines[1]


def test_a_live_view_says_what_is_waited_for() -> None:
    text = "\n".join(drawn(standing.View(status())))
    assert "rounds   2 of 8" in text and "updates  4 of 10" in text
    assert "8 devices at work" in text and " s to the deadline" in text


@pytest.mark.parametrize("height", [12, 24, 50])
def test_a_live_view_of_many_releases_is_no_higher_than_its_screen_and_shows_the_newest(height: int) -> None:
    refused = {"ROUND_CLOSED": 2, "BAD_PAYLOAD": 31}
    lines = drawn(standing.View(status(200, refused=refused, detail="d" * 200, attempt=2)), height=height)
    assert len(lines) < height and all(len(line) <= 80 for line in lines)
    assert any(line.lstrip().startswith("199") for line in lines)
    assert any("older releases" in line for line in lines) and lines[-1] == "refused  31 BAD_PAYLOAD, 2 ROUND_CLOSED"


def test_what_a_person_wrote_is_no_markup() -> None:
    assert "[red]stop[/red]" in " ".join(drawn(standing.View(status(detail="[red]stop[/red]"))))


def test_a_run_that_rests_or_has_ended_waits_for_nothing() -> None:
    for state in ("paused", "done"):
        assert "at work" not in " ".join(drawn(standing.View(status(state=state))))


def test_watching_is_a_line_of_json_a_status_or_a_view(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "store") as coordinator, Connection(coordinator.address) as connection:
        run, task = created(connection, "one")
        watch = ["run", "watch", "one", "--coordinator", coordinator.address]
        looking = subprocess.Popen(command(*watch, "--json"), stdout=subprocess.PIPE, text=True, env=environment())
        assert looking.stdout is not None
        told = [json.loads(looking.stdout.readline())]
        connection.send(*update(run, task))
        evaluate = connection.check_in("d1", ("one",), 10.0)
        assert isinstance(evaluate, Task)
        connection.send(dataclasses.replace(named(evaluate, b"x"), digest="", size=0), b"")
        told += [json.loads(line) for line in looking.stdout.read().splitlines()]
        assert looking.wait(30) == 0
        shown = edgetune(*watch)
    states = [(one["state"], len(one["releases"])) for one in told]
    assert states[0] == ("running", 1) and states[-1][0] == "done" and len(states) == len(told)
    releases = [release for one in told for release in one["releases"]]
    assert [release["version"] for release in releases if release["held_out_loss"] is None] == [0, 1]
    assert len({json.dumps(release) for release in releases}) == len(releases)
    assert shown.stdout.endswith("\n"), "what follows begins a line of its own"
    assert shown.returncode == 0 and "one: done" in shown.stdout and "perplexity" in shown.stdout


def test_what_a_coordinator_without_identities_is_asked_wrongly_is_said(tmp_path: Path) -> None:
    spec = write_toy_spec(tmp_path / "toy.toml")
    spec.write_text(spec.read_text() + "bogus = 1\n")
    authority.create(tmp_path / "identity", ["localhost"])
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        there = ("--coordinator", coordinator.address)
        created = edgetune("run", "create", spec, *there)
        listed = edgetune("run", "list", *there, "--identity", tmp_path / "identity")
    assert created.returncode == 2 and "toy.toml: method: unknown key 'bogus'" in created.stderr
    assert listed.returncode == 1 and "Or it has no identities, and this call was made with one" in listed.stderr
