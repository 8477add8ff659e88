"""Whole federations of real processes on the toy engine: rounds, restarts, refusals, verification."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import threading
import time
from pathlib import Path
from subprocess import Popen

import numpy as np
import pytest

from edge_client.transport import Connection
from quantize.tensors import SafeTensors
from tests.processes import CoordinatorProcess, edgetune, finished, start_client, write_texts, write_toy_spec
from tests.servers import free_ports
from wire.messages import RunStatus

WORDS = ["alpha", "beta", "gamma"]


def start_three(address: str, folder: Path, *more: str) -> list[Popen[str]]:
    return [
        start_client(address, write_texts(folder / f"{word}.jsonl", word), folder / word, *more, name=f"d-{word}")
        for word in WORDS
    ]


def create(address: str, folder: Path, **changes: object) -> None:
    result = edgetune("run", "create", write_toy_spec(folder / "spec.toml", **changes), "--coordinator", address)
    assert result.returncode == 0, result.stderr


def status(address: str, run: str = "toy") -> RunStatus:
    with Connection(address) as connection:
        return connection.status(run)


def test_three_clients_make_the_model_better_and_the_result_can_be_computed_again(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        create(coordinator.address, tmp_path, codec="top_k_int4", rounds=4)
        told = finished(start_three(coordinator.address, tmp_path))
        ended = status(coordinator.address)
    assert ended.state == "done"
    losses = [release.held_out_loss or 0.0 for release in ended.releases]
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.2
    assert all(release.contributions == 3 for release in ended.releases[1:])
    for events in told:
        sent = [e for e in events if e["event"] == "submitted"]
        assert [e["kind"] for e in sent] == ["train"] * 4 + ["evaluate"]
        assert all(e["float32_bytes"] / e["bytes_up"] > 8 for e in sent[:4])
    verified = edgetune("run", "verify", "toy", "--store", tmp_path / "store", "--json")
    assert verified.returncode == 0 and json.loads(verified.stdout)["verified"]


def test_a_client_that_comes_before_its_coordinator_says_so_and_waits(tmp_path: Path) -> None:
    [port] = free_ports(1)
    address, data = f"127.0.0.1:{port}", write_texts(tmp_path / "text.jsonl", "early")
    early = start_client(address, data, tmp_path / "state", name="early")
    assert early.stdout is not None
    away = json.loads(early.stdout.readline())
    assert away["event"] == "away" and away["address"] == address
    with CoordinatorProcess(tmp_path / "store", address):
        create(address, tmp_path, goal=1, rounds=1)
        [events] = finished([early])
    assert [e["event"] for e in events if e["event"] in ("away", "finished")] == ["finished"]


def test_a_client_whose_coordinator_is_something_else_ends_soon_and_says_what_may_be_wrong(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        threading.Thread(target=_hang_up, args=(deaf,), daemon=True).start()
        address = f"127.0.0.1:{deaf.getsockname()[1]}"
        client = start_client(address, write_texts(tmp_path / "text.jsonl", "x"), tmp_path / "state", name="d")
        out, err = client.communicate(timeout=30)
    assert client.returncode == 1 and "this call was made without one" in err
    assert [json.loads(line)["event"] for line in out.splitlines()][-1] == "ended"


def _hang_up(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            server.accept()[0].close()


def test_two_federations_with_one_seed_publish_the_same_releases(tmp_path: Path) -> None:
    digests = []
    for attempt in ("first", "second"):
        folder = tmp_path / attempt
        folder.mkdir()
        with CoordinatorProcess(folder / "store") as coordinator:
            create(coordinator.address, folder, codec="int8")
            finished(start_three(coordinator.address, folder))
            digests.append([release.digest for release in status(coordinator.address).releases])
    assert digests[0] == digests[1] and len(digests[0]) == 4


def test_a_coordinator_killed_in_the_middle_of_a_round_loses_nothing(tmp_path: Path) -> None:
    first = CoordinatorProcess(tmp_path / "store")
    create(first.address, tmp_path, rounds=5, local_steps=40, learning_rate=0.002, codec="top_k_int4")
    clients = start_three(first.address, tmp_path)
    with Connection(first.address) as connection:
        next(s for s in connection.watch("toy") if s.round >= 2 and 0 < s.accepted < 3)
    first.kill()
    with CoordinatorProcess(tmp_path / "store", first.address) as second:
        finished(clients)
        ended = status(second.address)
    assert ended.state == "done" and [r.contributions for r in ended.releases] == [0, 3, 3, 3, 3, 3]
    assert edgetune("run", "verify", "toy", "--store", tmp_path / "store").returncode == 0


def test_a_client_killed_between_training_and_receipt_goes_on_where_it_was(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        create(coordinator.address, tmp_path, goal=1, rounds=6, local_steps=60, learning_rate=0.002, codec="top_k_int4")
        data = write_texts(tmp_path / "a.jsonl", "alpha")
        client = start_client(coordinator.address, data, tmp_path / "state", name="a")
        with Connection(coordinator.address) as connection:
            next(s for s in connection.watch("toy") if s.round >= 3)
        client.kill()
        client.communicate()
        finished([start_client(coordinator.address, data, tmp_path / "state", name="a")])
        assert status(coordinator.address).state == "done"
    assert edgetune("run", "verify", "toy", "--store", tmp_path / "store").returncode == 0


def test_an_interrupted_client_gives_its_task_back_and_says_nothing_ugly(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        create(coordinator.address, tmp_path, goal=1, local_steps=100_000)
        data = write_texts(tmp_path / "a.jsonl", "alpha")
        client = start_client(coordinator.address, data, tmp_path / "state", name="a")
        assert client.stdout is not None
        while '"step"' not in client.stdout.readline():
            assert client.poll() is None
        assert status(coordinator.address).offered == 1
        client.send_signal(signal.SIGINT)
        out, err = client.communicate(timeout=20)
        assert client.returncode == 130 and "Traceback" not in err
        assert json.loads(out.splitlines()[-1]) == {"event": "ended", "error": "interrupted"}
        assert status(coordinator.address).offered == 0


def test_a_round_goes_on_without_a_device_that_died(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        create(coordinator.address, tmp_path, goal=2, minimum=1, deadline_s=2.0, rounds=2)
        dead = start_client(coordinator.address, write_texts(tmp_path / "a.jsonl", "x"), tmp_path / "dead", name="dead")
        time.sleep(0.2)
        dead.kill()
        dead.communicate()
        data = write_texts(tmp_path / "b.jsonl", "beta")
        finished([start_client(coordinator.address, data, tmp_path / "live", name="live")])
        assert status(coordinator.address).state == "done"


def test_a_damaged_update_is_found_by_verify(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        create(coordinator.address, tmp_path, goal=1, rounds=1)
        data = write_texts(tmp_path / "a.jsonl", "alpha")
        finished([start_client(coordinator.address, data, tmp_path / "state", name="a")])
    for blob in (tmp_path / "store" / "blobs").glob("??/*"):
        content = bytearray(blob.read_bytes())
        content[-1] ^= 1
        blob.write_bytes(content)
    result = edgetune("run", "verify", "toy", "--store", tmp_path / "store")
    assert result.returncode == 1 and "NOT verified" in result.stdout


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("", "empty"),
        ('{"text": "a"}\nnot json\n', "bad.jsonl:2"),
        ('{"text": "a"}\n{"other": 1}\n', "bad.jsonl:2"),
        ('{"text": 5}\n', "bad.jsonl:1"),
    ],
)
def test_a_bad_data_file_stops_the_client_before_anything_starts(
    tmp_path: Path, content: str | None, said: str
) -> None:
    data = tmp_path / "bad.jsonl"
    if content is not None:
        data.write_text(content)
    result = edgetune("client", "join", "--coordinator", "127.0.0.1:9", "--data", data, "--state", tmp_path / "state")
    assert result.returncode == 2 and said in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "state").exists()


def test_two_clients_cannot_share_one_state(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        data = write_texts(tmp_path / "a.jsonl", "alpha")
        first = start_client(coordinator.address, data, tmp_path / "state", name="a")
        assert first.stdout is not None and first.stdout.readline()
        second = edgetune(
            "client", "join", "--coordinator", coordinator.address, "--data", data, "--state", tmp_path / "state"
        )
        first.send_signal(signal.SIGINT)
        first.communicate(timeout=20)
    assert second.returncode == 2 and "another client is using this state" in second.stderr


def test_a_spec_with_an_unknown_key_or_method_is_refused_by_name(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        spec = write_toy_spec(tmp_path / "spec.toml")
        good = spec.read_text()
        for text, said in [
            (good.replace("rounds =", "turns ="), "turns"),
            (good.replace('id = "lora"', 'id = "sorcery"'), "sorcery"),
            (good.replace("rank = 10", "rank = 0"), "rank"),
            (good.replace('codec = "float32"', 'codec = "gzip"'), "gzip"),
            (good.replace("rounds = 3", 'rounds = "three"'), "rounds"),
            (good.replace("goal = 3", "goal = "), "TOML"),
        ]:
            spec.write_text(text)
            result = edgetune("run", "create", spec, "--coordinator", coordinator.address)
            assert result.returncode == 2 and said in result.stderr and "Traceback" not in result.stderr, text
        with Connection(coordinator.address) as connection:
            assert connection.runs() == []


def test_a_client_that_records_writes_every_delta_as_it_was_before_the_codec(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        create(coordinator.address, tmp_path, goal=1, rounds=2, codec="float32")
        data = write_texts(tmp_path / "a.jsonl", "alpha")
        more = ("--record-deltas", str(tmp_path / "deltas"))
        finished([start_client(coordinator.address, data, tmp_path / "state", *more, name="a")])
        with Connection(coordinator.address) as connection:
            _, layout = connection.describe("toy")
            releases = [connection.release("toy", 4 * layout.size, version) for version in range(3)]
    adapters = [np.frombuffer(release.data, "<f4") for release in releases]
    for number, path in enumerate(sorted((tmp_path / "deltas").iterdir())):
        file = SafeTensors(path)
        told = (file.metadata["round"], file.metadata["device"], file.metadata["base"])
        assert told == (str(number + 1), "a", releases[number].release.digest)
        delta = np.concatenate([file.read(name).reshape(-1) for name in file.names()])
        np.testing.assert_allclose(delta, adapters[number + 1] - adapters[number], atol=1e-6)
        assert np.abs(delta).max() > 1e-3
    assert number == 1


def test_a_delta_that_cannot_be_recorded_is_sent_all_the_same(tmp_path: Path) -> None:
    with CoordinatorProcess(tmp_path / "store") as coordinator:
        create(coordinator.address, tmp_path, goal=1, rounds=2, codec="float32")
        data, deltas = write_texts(tmp_path / "a.jsonl", "alpha"), tmp_path / "deltas"
        (deltas / "toy-0001-a.safetensors" / "in the way").mkdir(parents=True)
        more = ("--record-deltas", str(deltas))
        (told,) = finished([start_client(coordinator.address, data, tmp_path / "state", *more, name="a")])
        assert status(coordinator.address).state == "done"
    (warning,) = [event for event in told if event["event"] == "unrecorded"]
    assert warning["round"] == 1 and "toy-0001-a.safetensors: cannot be written" in warning["detail"]
    assert [event["round"] for event in told if event["event"] == "submitted"][:2] == [1, 2]
    assert sorted(path.name for path in deltas.iterdir()) == ["toy-0001-a.safetensors", "toy-0002-a.safetensors"]
