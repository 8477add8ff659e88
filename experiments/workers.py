"""A simulated federation spread over workers: processes here, or actors of a Ray cluster. Each has one engine over one base for
all of its devices, and their codecs' states; what goes to and fro is bytes. The releases are those of one process, bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any, Protocol

from experiments.benchmark_cell import Federation, Setting
from experiments.cells import Cell
from experiments.simulation import Published, Sent, Spent
from wire import addresses, spec
from wire.errors import MachineError, MissingExtra, UserError
from wire.messages import ReleaseManifest
from wire.spec import Plain

LENGTH = struct.Struct("<I")
ANSWERS_S = 10.0
"""How long a cluster has to take a connection."""


class Worker:
    """Some devices of a cell. `call` answers a request of `request`."""

    def __init__(self, cell: str, settings: str) -> None:
        """Both as JSON."""
        setting = Setting(Cell(**json.loads(cell)), json.loads(settings))
        self._federation = Federation(setting, list(setting.shares))

    def call(self, asked: bytes) -> bytes:
        head, blobs = opened(asked)
        if head["do"] == "follow":
            release = spec.parse(ReleaseManifest, head["release"], "release")
            self._federation.simulation.follow(Published(release, tuple(blobs)))
            return packed({}, [])
        sent = [self._federation.sent(device) for device in head["devices"]]
        told = [{"device": s.device, "examples": s.examples, "spent": dataclasses.asdict(s.spent)} for s in sent]
        return packed({"sent": told}, [s.payload for s in sent])


class Hand(Protocol):
    """A worker, elsewhere."""

    def ask(self, request: bytes) -> None:
        """Returns at once."""

    def answer(self) -> bytes:
        """Of the last request, once it is there. Raises MachineError for a worker that is gone."""

    def close(self) -> None: ...


class Spread:
    """A federation whose devices train on `hands`, each always on the same; releases are made here."""

    def __init__(self, cell: Cell, settings: Plain, hands: Sequence[Hand]) -> None:
        setting = Setting(cell, settings)
        self.devices = list(setting.shares)
        self.federation = Federation(setting, self.devices)
        self._hands = hands

    def round(self) -> Spent:
        """Raises MachineError for a worker that is gone, PayloadError for an update that a coordinator would refuse."""
        for n, hand in enumerate(self._hands):
            hand.ask(packed({"do": "train", "devices": self.devices[n :: len(self._hands)]}, []))
        found = {sent.device: sent for hand in self._hands for sent in _sent(hand.answer())}
        ordered = [found[device] for device in self.devices]
        published = self.federation.simulation.publish(ordered)
        for hand in self._hands:
            hand.ask(packed({"do": "follow", "release": spec.plain(published.release)}, published.blobs))
        for hand in self._hands:
            hand.answer()
        return sum((sent.spent for sent in ordered), Spent())


def _sent(answer: bytes) -> Iterator[Sent]:
    head, payloads = opened(answer)
    for told, payload in zip(head["sent"], payloads, strict=True):
        yield Sent(told["device"], payload, told["examples"], Spent(**told["spent"]))


def packed(head: Plain, blobs: Sequence[bytes]) -> bytes:
    """The length of a JSON head, the head with the blobs' lengths, the blobs."""
    told = json.dumps(head | {"sizes": [len(blob) for blob in blobs]}).encode()
    return LENGTH.pack(len(told)) + told + b"".join(blobs)


def opened(data: bytes) -> tuple[Plain, list[bytes]]:
    end = LENGTH.size + LENGTH.unpack_from(data)[0]
    head, blobs = json.loads(data[LENGTH.size : end]), []
    for size in head["sizes"]:
        blobs.append(data[end : end + size])
        end += size
    return head, blobs


class ProcessHand:
    """A worker in a process of its own, on this machine; it ends with this one."""

    def __init__(self, cell: str, settings: str) -> None:
        line = [sys.executable, "-m", "experiments.workers", cell, settings]
        self._process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # this program itself

    def ask(self, request: bytes) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` says it
            _write(self._process.stdin, request)

    def answer(self) -> bytes:
        assert self._process.stdout is not None
        found = _read(self._process.stdout)
        if found is None:
            raise MachineError(f"a worker ended with status {self._process.wait()}")
        return found

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


class RayHand:
    """A worker that is an actor of a Ray cluster, on whichever of its machines has room."""

    def __init__(self, ray: Any, cell: str, settings: str) -> None:
        self._ray = ray
        self._actor = ray.remote(num_cpus=1)(Worker).remote(cell, settings)
        self._asked: Any = None

    def ask(self, request: bytes) -> None:
        self._asked = self._actor.call.remote(request)

    def answer(self) -> bytes:
        try:
            found: bytes = self._ray.get(self._asked)
        except self._ray.exceptions.RayError as error:
            raise MachineError(f"a Ray worker failed: {str(error).strip().splitlines()[-1]}") from error
        return found

    def close(self) -> None:
        self._ray.kill(self._actor)


@contextlib.contextmanager
def hands(where: str, address: str | None, workers: int, cell: Cell, settings: Plain) -> Iterator[list[Hand]]:
    """`workers` workers in "processes", or on "ray" at `address` (None: a cluster of this machine, for as long as this lasts).

    Raises MissingExtra where Ray is not installed, UserError for a cluster that does not answer."""
    told = json.dumps(dataclasses.asdict(cell)), json.dumps(settings)
    with contextlib.ExitStack() as open_:
        ray = open_.enter_context(_cluster(address, workers)) if where == "ray" else None
        made: list[Hand] = [ProcessHand(*told) if ray is None else RayHand(ray, *told) for _ in range(workers)]
        for hand in made:
            open_.callback(hand.close)
        yield made


@contextlib.contextmanager
def _cluster(address: str | None, workers: int) -> Iterator[Any]:
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("ray", "ray") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    _look_at(address)
    local: Plain = {"num_cpus": workers, "include_dashboard": False} if address is None else {"address": address}
    try:
        ray.init(**local, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise UserError(f"--address {address}: no Ray cluster answers there: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _look_at(address: str | None) -> None:
    """Raises UserError where nobody listens: Ray itself asks for minutes. Its own words, such as "auto", are left to it."""
    if address is None or ":" not in address:
        return
    try:
        socket.create_connection(addresses.parse(address.removeprefix("ray://")), timeout=ANSWERS_S).close()
    except OSError as error:
        raise UserError(f"--address {address}: no Ray cluster answers there: {error.strerror or error}") from error


def _write(file: IO[bytes], data: bytes) -> None:
    file.write(LENGTH.pack(len(data)) + data)
    file.flush()


def _read(file: IO[bytes]) -> bytes | None:
    head = file.read(LENGTH.size)
    return file.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else None


def main(cell: str, settings: str) -> None:
    """Answer requests until there are no more."""
    worker = Worker(cell, settings)
    out = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    while (asked := _read(sys.stdin.buffer)) is not None:
        _write(out, worker.call(asked))


if __name__ == "__main__":
    main(*sys.argv[1:])
