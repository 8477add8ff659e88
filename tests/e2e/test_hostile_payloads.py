"""A device that is given a task and sends what no device should, to a real coordinator: each is refused by name, in bounded
time and memory, runs nothing, and harms no round."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import zstandard

from edge_client.transport import Connection
from tests.processes import CoordinatorProcess, edgetune
from tests.updates import created, named, newest, reason_of, update
from wire.delta import Layout, Tensor
from wire.errors import Reason
from wire.messages import Contribution, Task
from wire.run_spec import RunSpec

LAYOUT = Layout((Tensor("w", (500, 500)),))
HEADER_BYTES = 20
STORED, COMPRESSED = b"\x00", b"\x01"
BOMB_BYTES = 1 << 30
MOST_S = 2.0
"""On two cores that others use too; alone each takes milliseconds."""
MOST_BYTES = 4 * LAYOUT.size + (32 << 20)
"""What the peak of the coordinator's memory may grow by: the decoded update, and room for the rest."""
Attack = tuple[str, Contribution, bytes, Reason]


@dataclasses.dataclass(frozen=True)
class Trap:
    """Unpickling this makes the file."""

    file: Path

    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path.touch, (self.file,)  # type: ignore[return-value]  # whatever a pickle says is called


def bomb(states_its_size: bool) -> bytes:
    """A zstd frame of a gibibyte of zeros, some tens of kilobytes long."""
    compressor = zstandard.ZstdCompressor(write_content_size=states_its_size)
    stream = compressor.compressobj(size=BOMB_BYTES if states_its_size else -1)
    zeros = bytes(1 << 20)
    return b"".join(stream.compress(zeros) for _ in range(BOMB_BYTES >> 20)) + stream.flush()


def that_states(frame: bytes, size: int) -> bytes:
    """The frame, with another content size in its header of eight bytes."""
    assert frame[4] >> 6 == 2, "a four-byte content size"
    at = 5 + (0 if frame[4] & 0x20 else 1)
    return frame[:at] + struct.pack("<I", size) + frame[at + 4 :]


def safetensors(tensors: int) -> bytes:
    empty = {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(tensors)}
    header = json.dumps(empty).encode()
    return struct.pack("<Q", len(header)) + header


def attacks(run: RunSpec, task: Task, trap: Path) -> Iterator[Attack]:
    mine, good = update(run, task, LAYOUT)
    header = good[:HEADER_BYTES]
    evil, stated, unstated = pickle.dumps(Trap(trap)), bomb(True), bomb(False)
    whole = 2 * LAYOUT.size
    bodies = {
        "a pickle": (evil, Reason.BAD_PAYLOAD),
        "a pickle behind a good header": (header + STORED + evil, Reason.BAD_PAYLOAD),
        "a bomb that states its size": (header + COMPRESSED + stated, Reason.BAD_PAYLOAD),
        "a bomb that does not": (header + COMPRESSED + unstated, Reason.BAD_PAYLOAD),
        "a bomb that states the right size": (header + COMPRESSED + that_states(stated, whole), Reason.BAD_PAYLOAD),
        "a second frame behind the first": (good + unstated, Reason.BAD_PAYLOAD),
        "a safetensors header of 200,000 tensors": (safetensors(200_000), Reason.TOO_LARGE),
        "as many as fit, behind a good header": (header + STORED + safetensors(6_000), Reason.BAD_PAYLOAD),
        "not a number": (header + STORED + not_finite(np.nan), Reason.NOT_FINITE),
        "infinity": (header + STORED + not_finite(np.inf), Reason.NOT_FINITE),
    }
    for what, (payload, reason) in bodies.items():
        yield what, named(task, payload), payload, reason
    yield "on another base", dataclasses.replace(mine, base_digest="1" * 64), good, Reason.WRONG_BASE


def not_finite(value: float) -> bytes:
    entries = np.zeros(LAYOUT.size, "<f2")
    entries[LAYOUT.size // 2] = value
    return entries.tobytes()


def forget_peak(coordinator: CoordinatorProcess) -> int:
    """Let the peak be what is held now; that."""
    Path(f"/proc/{coordinator.process.pid}/clear_refs").write_text("5")
    return coordinator.rss_bytes()


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="measures memory as Linux shows it")
def test_hostile_payloads_are_refused_by_name_in_bounded_time_and_memory_and_the_round_is_unharmed(
    tmp_path: Path,
) -> None:
    trap = tmp_path / "trap"
    with CoordinatorProcess(tmp_path / "store") as coordinator, Connection(coordinator.address) as connection:
        codec = [{"id": "float16"}, {"id": "pack"}, {"id": "zstd"}]
        run, task = created(connection, "hostile", LAYOUT, codec=codec, rounds=2)
        expected: dict[str, int] = {}
        for what, contribution, payload, reason in attacks(run, task, trap):
            before, began = forget_peak(coordinator), time.monotonic()
            assert reason_of(lambda c=contribution, p=payload: connection.send(c, p)) is reason, what
            seconds, grown = time.monotonic() - began, coordinator.rss_bytes(peak=True) - before
            assert seconds < MOST_S and grown < MOST_BYTES, f"{what}: {seconds:.2f} s, {grown >> 20} MiB"
            print(f"{what}: {reason} after {seconds * 1000:.0f} ms, {len(payload):,} bytes, {grown / 2**20:+.1f} MiB")
            expected[reason.value] = expected.get(reason.value, 0) + 1
        status = connection.status("hostile")
        assert (status.refused, status.accepted, status.state) == (expected, 0, "running")
        assert not trap.exists()
        replays_count_nothing(connection, run, task)
        np.testing.assert_array_equal(newest(connection, "hostile", LAYOUT)[1], np.full(LAYOUT.size, 0.5, np.float32))
    assert edgetune("run", "verify", "hostile", "--store", tmp_path / "store").returncode == 0


def replays_count_nothing(connection: Connection, run: RunSpec, task: Task) -> None:
    """An update again as it was gets its receipt again; under any other name it is refused."""
    mine, good = update(run, task, LAYOUT)
    receipt = connection.send(mine, good)
    following = connection.check_in("d1", ("hostile",), 20.0)
    assert isinstance(following, Task) and following.round == 2
    assert connection.send(mine, good) == receipt
    replayed = {
        "by a device without a task": (dataclasses.replace(mine, device="d2", round=2), Reason.NOT_ASSIGNED),
        "in the next round": (dataclasses.replace(mine, round=2), Reason.WRONG_BASE),
    }
    for what, (contribution, reason) in replayed.items():
        assert reason_of(lambda c=contribution: connection.send(c, good)) is reason, what
    other = update(run, task, LAYOUT, value=0.25)
    assert reason_of(lambda: connection.send(*other)) is Reason.CONFLICTING_UPDATE
    status = connection.status("hostile")
    assert (status.round, status.accepted, status.releases[-1].contributions) == (2, 0, 1)
