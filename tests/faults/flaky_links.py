"""A link between a client and whichever replica answers, on loopback, that loses requests, answers and time as its weather is.

Each new connection goes to a replica of its own choice, and a connection to one that is stopped is left, as a balancer leaves
what does not answer: what a client says twice is heard by two of them. A replica hears late that its end was cut, and goes on
meanwhile with what it had been told.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from pathlib import Path
from random import Random

from tests.faults.draws import Weather

UPDATE_BYTES, ANSWER_BYTES = 1024, 80
"""A chunk as long as this has an update in it; one of fewer bytes has only what HTTP/2 says to itself."""
LATEST_S = 0.5
"""After which a replica hears that the other end is gone."""
LOOK_S = 0.05
"""How often it is looked whether a replica is still there."""


class FlakyLink:
    """TCP from a port of its own to one of `addresses`: a folder with a file for each replica that serves. It is steady from
    when `calm` is there. What it did goes to `log`, one line each."""

    def __init__(self, addresses: Path, calm: Path, log: Path, weather: Weather, chance: Random) -> None:
        self._addresses, self._calm, self._log = addresses, calm, log
        self._weather, self._chance = weather, chance
        self._asked = dict[socket.socket, socket.socket]()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        path, far = self._connected()
        if far is None:
            _shut(near)
            return
        back = (far, near, self._weather.lose_answer, "answer lost")
        threading.Thread(target=self._forward, args=(near, far, *back), daemon=True).start()
        threading.Thread(target=_leave_when_gone, args=(path, near), daemon=True).start()
        self._forward(near, far, near, far, self._weather.cut, "request cut")

    def _connected(self) -> tuple[Path, socket.socket | None]:
        found = sorted(self._addresses.glob("*"))
        self._chance.shuffle(found)
        for path in found:
            with contextlib.suppress(OSError, ValueError):
                host, _, port = path.read_text().rpartition(":")
                return path, socket.create_connection((host, int(port)), timeout=5)
        return self._addresses, None

    def _forward(
        self,
        near: socket.socket,
        far: socket.socket,
        source: socket.socket,
        sink: socket.socket,
        cut: float,
        named: str,
    ) -> None:
        with contextlib.suppress(OSError):
            source.settimeout(None)
            while data := source.recv(1 << 14):
                if not self._calm.exists() and self._is_broken(source, sink, data, cut, named):
                    break
                sink.sendall(data)
        _shut(near)
        if not self._calm.exists():
            time.sleep(self._chance.uniform(0, LATEST_S))
        _shut(far)

    def _is_broken(self, source: socket.socket, sink: socket.socket, data: bytes, cut: float, named: str) -> bool:
        if self._chance.random() < self._weather.delay:
            time.sleep(self._chance.uniform(0, self._weather.longest_delay_s))
        if self._chance.random() < cut:
            self._tell(named)
            return True
        if self._is_receipt(source, sink, data) and self._chance.random() < self._weather.lose_receipt:
            self._tell("receipt lost")
            return True
        return False

    def _is_receipt(self, source: socket.socket, sink: socket.socket, data: bytes) -> bool:
        """Whether this is likely the answer to an update: the first of some length after many bytes went up."""
        if len(data) >= UPDATE_BYTES:
            self._asked[source] = sink
        if len(data) < ANSWER_BYTES or self._asked.get(sink) is not source:
            return False
        del self._asked[sink]
        return True

    def _tell(self, what: str) -> None:
        append(self._log, {"what": what})


def _leave_when_gone(path: Path, near: socket.socket) -> None:
    while near.fileno() >= 0:
        if not path.exists():
            return _shut(near)
        time.sleep(LOOK_S)


def append(log: Path, line: dict[str, object]) -> None:
    """In one write, so that lines of many processes do not mix."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(handle, json.dumps(line).encode() + b"\n")
    os.close(handle)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
