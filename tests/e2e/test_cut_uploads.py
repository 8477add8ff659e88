"""A large update over a link that is cut again and again, both ends killed in turn; real processes, both kinds of store."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edge_client.transport import Connection
from tests.large_update import LAYOUT, RUN
from tests.links import Link
from tests.processes import CoordinatorProcess, edgetune, environment
from wire.messages import PART_BYTES

CUTS = 20
SIZE = 4 * LAYOUT.size


def start_client(address: str, state: Path) -> subprocess.Popen[str]:
    line = [sys.executable, "-m", "tests.large_update", address, str(state)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


@pytest.fixture(params=["folder", "servers"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, ...]:
    """What follows --store."""
    if request.param == "folder":
        return (str(tmp_path / "store"),)
    ledger, blobs = (request.getfixturevalue(f"{name}_server").fresh() for name in ("postgres", "s3"))
    return (ledger, "--blobs", blobs)


class Scene:
    """A coordinator, a link to it, and a client at the other end of the link."""

    def __init__(self, store: tuple[str, ...], state: Path) -> None:
        self._store, self._state = store, state
        self.coordinator = CoordinatorProcess(store[0], "127.0.0.1:0", *store[1:])
        with Connection(self.coordinator.address) as connection:
            connection.create_run(RUN, LAYOUT, np.zeros(LAYOUT.size, np.float32))
        self.link = Link(self.coordinator.address)
        self.client = start_client(self.link.address, state)
        self.told: list[dict[str, Any]] = []

    def kill_client(self) -> None:
        self.client.kill()
        self._listen()

    def start_client(self) -> None:
        self.client = start_client(self.link.address, self._state)

    def kill_coordinator(self) -> None:
        self.coordinator.kill()

    def start_coordinator(self) -> None:
        self.coordinator = CoordinatorProcess(self._store[0], self.coordinator.address, *self._store[1:])

    def finish(self) -> None:
        said = self._listen()
        assert self.client.returncode == 0, said

    def _listen(self) -> str:
        out, err = self.client.communicate(timeout=60)
        lines = out.splitlines() if out.endswith("\n") else out.splitlines()[:-1]  # the last one was cut off with it
        self.told += [json.loads(line) for line in lines]
        return err

    def close(self) -> None:
        self.link.close()
        self.client.kill()
        self.coordinator.kill()


@pytest.fixture
def scene(store: tuple[str, ...], tmp_path: Path) -> Iterator[Scene]:
    opened = Scene(store, tmp_path / "state")
    yield opened
    opened.close()


def test_an_update_cut_twenty_times_with_both_ends_killed_in_turn_is_sent_once_and_counted_once(
    scene: Scene, store: tuple[str, ...]
) -> None:
    offsets = sorted(random.Random(4).sample(range(1, SIZE), CUTS))
    for number, (before, offset) in enumerate(zip([0, *offsets], offsets, strict=False)):
        scene.link.cut_at(offset - before)
        scene.link.mend()
        if number:
            (scene.start_coordinator, scene.start_client)[number % 2]()
        assert scene.link.was_cut.wait(60), scene.client.poll()
        (scene.kill_client, scene.kill_coordinator)[number % 2]()
    scene.link.mend()
    scene.start_coordinator()
    scene.finish()
    print(f"{scene.link.bytes_up:,} bytes went up for {SIZE:,}, cut {CUTS} times at {offsets}")
    assert SIZE < scene.link.bytes_up <= SIZE + CUTS * PART_BYTES
    assert [e["event"] for e in scene.told].count("submitted") == 1
    sent = [e["sent"] for e in scene.told if e["event"] == "uploading"]
    assert sent == sorted(sent) and sent[-1] > SIZE
    with Connection(scene.coordinator.address) as connection:
        [_, release] = next(s for s in connection.watch(RUN.name) if len(s.releases) == 2).releases
    assert (release.contributions, release.bytes_up) == (1, sent[-1])
    assert edgetune("run", "verify", RUN.name, "--store", *store).returncode == 0
