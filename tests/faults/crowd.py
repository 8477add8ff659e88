"""A process full of unsteady devices, each a thread that takes part as `edgetune client join` does: the product's own
transport, loop and folder, with the toy engine. Some vanish in the middle of a task and come back later, some send bytes
that are not what they should be. What a device was promised is journalled outside the store.

    python -m tests.faults.crowd ADDRESS FOLDER FIRST COUNT SEED TRAIN_S
"""

from __future__ import annotations

import collections
import dataclasses
import json
import pickle
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edge_client import calls
from edge_client.data import Example
from edge_client.participate import participate
from edge_client.session import Device, Session
from edge_client.state import DeviceState
from edge_client.transport import Connection
from protos.v1 import federation_pb2 as pb
from tests.faults.invariants import note
from wire import spec
from wire.errors import Reason, Refused, Unreachable
from wire.messages import Contribution, Receipt, Task

RUN = "soak"
DROP_OUT = 0.10
"""Of a device's tasks: how many it vanishes from, and how many it sends something else for."""
AWAY_S = (1.0, 10.0)
Sent = tuple[Contribution, bytes]


class Vanished(BaseException):
    """The device is gone, as by a kill -9: nothing of the program may catch this and tidy up."""


def _as_if(mine: Contribution, payload: bytes) -> Sent:
    return dataclasses.replace(mine, digest=spec.bytes_digest(payload), size=len(payload)), payload


def _flipped(mine: Contribution, payload: bytes) -> Sent:
    middle = len(payload) // 2
    return mine, payload[:middle] + bytes([payload[middle] ^ 1]) + payload[middle + 1 :]


CORRUPTIONS: dict[str, tuple[Callable[[Contribution, bytes], Sent], Reason]] = {
    "a bit flipped on the way": (_flipped, Reason.BAD_DIGEST),
    "cut short": (lambda mine, payload: _as_if(mine, payload[:-4]), Reason.BAD_PAYLOAD),
    "not a number": (lambda mine, payload: _as_if(mine, payload[:-4] + b"\0\0\xc0\x7f"), Reason.NOT_FINITE),
    "another size than it says": (
        lambda mine, payload: (dataclasses.replace(mine, size=mine.size - 1), payload),
        Reason.BAD_SIZE,
    ),
    "a pickle": (lambda mine, payload: _as_if(mine, pickle.dumps({"update": payload})[:512]), Reason.BAD_PAYLOAD),
    "on another base": (
        lambda mine, payload: (dataclasses.replace(mine, base_digest="0" * 64), payload),
        Reason.WRONG_BASE,
    ),
}
"""What is sent instead, and the name that it must be refused by."""
CLOSED = {Reason.ROUND_CLOSED, Reason.NOT_ASSIGNED, Reason.RUN_ENDED, Reason.CONFLICTING_UPDATE}
"""A round may end before anybody looks at what was sent."""


class Tally:
    """What all devices of a process saw. `commits`: seconds of each `Submit` that was answered; `sends`: of each update
    from its first byte to its receipt, whatever went wrong on the way."""

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()
        self.refused: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.commits: list[float] = []
        self.sends: list[float] = []

    def plain(self) -> dict[str, Any]:
        return vars(self)


@dataclasses.dataclass(frozen=True)
class Habits:
    """The longest that training takes, and the share of updates that are damaged on their way."""

    train_s: float
    corrupt: float


class Unsteady(Connection):
    """A device's connection, and what befalls the device while it uses it."""

    def __init__(self, address: str, journal: Path, habits: Habits, chance: random.Random, tally: Tally) -> None:
        super().__init__(address, patience_s=120.0)
        self._journal, self._chance, self._tally, self._gone = journal, chance, tally, False
        self._habits = habits

    def release(self, *args: Any, **named: Any) -> Any:
        self._vanish(DROP_OUT / 3, "before training")
        fetched = super().release(*args, **named)
        longest_s = self._habits.train_s
        time.sleep(self._chance.uniform(longest_s / 6, longest_s))  # devices are of different speeds
        return fetched

    def send(self, contribution: Contribution, payload: bytes, *more: Any) -> Receipt:
        if payload:
            self._tally.counts["updates"] += 1
            self._vanish(DROP_OUT / 3, "before sending")
            if self._chance.random() < self._habits.corrupt:
                self._send_corrupted(contribution, payload)
        began = time.monotonic()
        receipt = super().send(contribution, payload, *more)
        self._tally.sends.append(time.monotonic() - began)
        if payload:
            self._vanish(DROP_OUT / 3, "before reading the receipt")
        note(self._journal, receipt)
        self._tally.counts["receipts"] += 1
        return receipt

    def leave(self, device: str, task: Task) -> None:
        if not self._gone:
            super().leave(device, task)

    def _call(self, method: Any, request: Any, *more: Any) -> Any:
        began = time.monotonic()
        reply = super()._call(method, request, *more)
        if isinstance(request, pb.SubmitRequest):
            self._tally.commits.append(time.monotonic() - began)
        return reply

    def _vanish(self, share: float, when: str) -> None:
        if self._chance.random() < share:
            self._gone = True
            self._tally.counts[f"vanished {when}"] += 1
            raise Vanished

    def _send_corrupted(self, contribution: Contribution, payload: bytes) -> None:
        """Raises what it is refused by: for the device, this update is over. Of an update that is counted already, as when
        a receipt was lost, nobody looks at the bytes again: there is the receipt once more."""
        kind = self._chance.choice(sorted(CORRUPTIONS))
        corrupt, expected = CORRUPTIONS[kind]
        try:
            receipt = super().send(*corrupt(contribution, payload))
            if receipt.digest != contribution.digest:
                self._tally.wrong.append(f"{kind}: accepted")
            note(self._journal, receipt)
        except Refused as error:
            if error.reason is expected:
                self._tally.refused[f"{kind}: {error.reason}"] += 1
            elif error.reason in CLOSED:
                self._tally.counts["corrupted for a round that had closed"] += 1
            else:
                self._tally.wrong.append(f"{kind}: {error.reason}, not {expected}")
            raise


def live(address: str, folder: Path, name: str, seed: int, habits: Habits, tally: Tally) -> None:
    """One device until the run has ended; what makes it stop, it comes back from, as by a service manager."""
    chance = random.Random(f"{seed}/{name}")
    examples = [Example(text=f"{name} says {word} " * 4) for word in ("one", "two", "three", "four", "five")]
    while True:
        state = DeviceState(folder / name, name)
        session = Session(Device(folder / "no file", engine="toy"), examples)
        try:
            with Unsteady(address, folder / f"{name}.receipts", habits, chance, tally) as connection:
                return participate(connection, session, state, (RUN,), False, lambda event, values: None)
        except Vanished:
            pass
        except Refused as error:
            tally.counts[f"stopped by {error.reason}"] += 1
        except Unreachable:
            tally.counts["gave up reaching anybody"] += 1
        finally:
            state.close()
        time.sleep(chance.uniform(*AWAY_S))


def main(arguments: list[str]) -> None:
    address, folder, habits = arguments[0], Path(arguments[1]), Habits(*map(float, arguments[5:]))
    first, count, seed = map(int, arguments[2:5])
    calls.OPTIONS.append(("grpc.use_local_subchannel_pool", 1))  # else the devices of a process share a connection
    tally = Tally()
    devices = [
        threading.Thread(target=live, args=(address, folder, f"d{number}", seed, habits, tally))
        for number in range(first, first + count)
    ]
    for device in devices:
        device.start()
    for device in devices:
        device.join()
    print(json.dumps(tally.plain()))


if __name__ == "__main__":
    main(sys.argv[1:])
