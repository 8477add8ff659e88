"""A federation spread over workers is that of one process, bit for bit, and says which worker is missing."""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
from pathlib import Path
from subprocess import DEVNULL
from typing import Any

import pytest

from experiments import simulate, workers
from experiments.workers import ProcessHand, opened, packed
from tests.processes import edgetune
from wire.errors import MachineError, UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part, lines in (("train", 240), ("test", 12)):
        text = "".join(
            json.dumps({"client": f"c{n % 60}", "text": f"line {n} of many " * 3}) + "\n" for n in range(lines)
        )
        (tmp_path / f"notes.{part}.jsonl").write_text(text)
    return tmp_path


def asked(folder: Path, *more: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    simulate.add_arguments(parser)
    line = ["--data", str(folder), "--domain", "notes", "--clients", "20", "--rounds", "2", "--json"]
    return parser.parse_args([*line, *more])


def digests(capsys: pytest.CaptureFixture[str], args: argparse.Namespace) -> list[str]:
    assert simulate.run(args) == 0
    found: Any = json.loads(capsys.readouterr().out)
    assert found["clients"] == 20
    return [each["release"] for each in found["rounds"]]


@pytest.mark.parametrize("method", ["fedit", "sparseloco", "fedsa_lora"])
def test_two_processes_make_the_releases_of_one(method: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = digests(capsys, asked(folder, "--method", method))
    there = digests(capsys, asked(folder, "--method", method, "--engine", "processes", "--workers", "2"))
    assert here == there and len(set(here)) == 2


def starts_ray() -> bool:
    """Whether Ray is installed, and finds what it needs to start: ports, shared memory, processes."""
    line = [sys.executable, "-c", "import ray; ray.init(num_cpus=1, include_dashboard=False); ray.shutdown()"]
    try:
        return subprocess.run(line, stdout=DEVNULL, stderr=DEVNULL, timeout=60, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def test_two_workers_on_ray_make_the_releases_of_one_process(folder: Path) -> None:
    """By the command: what Ray starts in a process stays in it."""
    if not starts_ray():
        pytest.skip("Ray does not start here")
    line = (
        "experiment",
        "simulate",
        "--data",
        folder,
        "--domain",
        "notes",
        "--clients",
        "20",
        "--rounds",
        "2",
        "--json",
    )
    told = [edgetune(*line, "--method", "sparseloco", *more) for more in ((), ("--engine", "ray", "--workers", "2"))]
    assert [one.returncode for one in told] == [0, 0], told[1].stderr
    here, there = ([each["release"] for each in json.loads(one.stdout)["rounds"]] for one in told)
    assert here == there and len(set(here)) == 2


def test_a_message_is_its_head_and_its_blobs() -> None:
    head, blobs = opened(packed({"do": "follow"}, [b"", b"abc"]))
    assert (head["do"], blobs) == ("follow", [b"", b"abc"])


def test_a_worker_that_is_gone_is_told(folder: Path) -> None:
    args = asked(folder)
    with workers.hands("processes", None, 1, simulate._cell(args), simulate._settings(args)) as hands:
        assert isinstance(hands[0], ProcessHand)
        hands[0]._process.kill()
        hands[0].ask(packed({"do": "train", "devices": ["device-0"]}, []))
        with pytest.raises(MachineError, match="a worker ended"):
            hands[0].answer()


def test_what_there_is_not_is_refused(folder: Path) -> None:
    with pytest.raises(UserError, match="--method: unknown"):
        simulate.run(asked(folder, "--method", "magic"))
    with pytest.raises(UserError, match="--workers must be at least 1"):
        simulate.run(asked(folder, "--workers", "0"))
    with pytest.raises(UserError, match="--seed must lie between 0"):
        simulate.run(asked(folder, "--seed", "-1"))
    with pytest.raises(UserError, match="--partition: unknown 'round'"):
        simulate.run(asked(folder, "--partition", "round"))
    with pytest.raises(UserError, match="give --engine ray with it"):
        simulate.run(asked(folder, "--address", "auto"))


def test_a_cluster_at_a_port_where_nobody_listens_is_refused_at_once(folder: Path) -> None:
    pytest.importorskip("ray")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    for there in (address, f"ray://{address}"):
        began = time.monotonic()
        with pytest.raises(UserError, match=f"--address {there}: no Ray cluster answers there"):
            simulate.run(asked(folder, "--engine", "ray", "--address", there))
        assert time.monotonic() - began < 2 * workers.ANSWERS_S
