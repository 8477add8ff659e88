"""A link between real processes, on loopback: it counts what goes up, and cuts where it is told to."""

from __future__ import annotations

import contextlib
import socket
import threading


class Link:
    """TCP from a port of its own to `address`. At the `cut_at`-th byte up from now all connections are cut, and `was_cut`
    is set; what lies beyond that byte is not delivered. Until `mend`, new connections are cut at once."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._to = (host, int(port))
        self._lock = threading.Lock()
        self._left: int | None = None
        self._open = set[socket.socket]()
        self.bytes_up, self.was_cut = 0, threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_at(self, more_bytes: int) -> None:
        with self._lock:
            self._left = more_bytes

    def mend(self) -> None:
        self.was_cut.clear()

    def close(self) -> None:
        self.was_cut.set()
        _shut(self._listener)
        self._cut()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(near,), daemon=True).start()

    def _serve(self, near: socket.socket) -> None:
        try:
            far = socket.create_connection(self._to)
        except OSError:
            _shut(near)
            return
        with self._lock:
            self._open |= {near, far}
        if self.was_cut.is_set():
            self._cut()
        threading.Thread(target=self._forward, args=(far, near, False), daemon=True).start()
        self._forward(near, far, True)

    def _forward(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 14):
                sink.sendall(self._passed(data) if up else data)
        for end in (source, sink):
            _shut(end)

    def _passed(self, data: bytes) -> bytes:
        """What of `data` the link still lets through: all, until the byte at which it is cut."""
        with self._lock:
            self.bytes_up += len(data)
            if self._left is None or len(data) < self._left:
                self._left = None if self._left is None else self._left - len(data)
                return data
            data, self._left = data[: self._left], None
        self.was_cut.set()
        self._cut()
        return data

    def _cut(self) -> None:
        with self._lock:
            ends, self._open = self._open, set()
        for end in ends:
            _shut(end)


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
