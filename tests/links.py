"""A link between real processes, on loopback: it counts what goes up and down, and cuts where it is told to."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


class Link:
    """TCP from a port of its own to `address`. At the `cut_at`-th byte up from now all connections are cut, and `was_cut`
    is set; what lies beyond that byte is not delivered. Until `mend`, new connections are cut at once. At the `freeze_at`-th
    byte nothing more is delivered either, until `thaw`, and nobody is told; `was_frozen` is set."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._to = (host, int(port))
        self._lock = threading.Lock()
        self._left: int | None = None
        self._at_it = self._cut
        self._open = set[socket.socket]()
        self.bytes_up, self.bytes_down = 0, 0
        self.was_cut, self.was_frozen = threading.Event(), threading.Event()
        self._thawed = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_at(self, more_bytes: int) -> None:
        with self._lock:
            self._left, self._at_it = more_bytes, self._cut

    def mend(self) -> None:
        self.was_cut.clear()

    def freeze_at(self, more_bytes: int) -> None:
        with self._lock:
            self._left, self._at_it = more_bytes, self._freeze

    def thaw(self) -> None:
        self._thawed.set()

    def close(self) -> None:
        self.was_cut.set()
        self.thaw()
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
                for piece in self._pieces(data) if up else self._whole(data):
                    sink.sendall(piece)
        for end in (source, sink):
            _shut(end)

    def _pieces(self, data: bytes) -> Iterator[bytes]:
        """`data`, in two where something happens to the link within it."""
        with self._lock:
            self.bytes_up += len(data)
            reached = self._left is not None and len(data) >= self._left
            before = self._left if self._left is not None and reached else len(data)
            self._left = None if self._left is None or reached else self._left - len(data)
        yield data[:before]
        if reached:
            self._at_it()
            yield data[before:]

    def _whole(self, data: bytes) -> Iterator[bytes]:
        with self._lock:
            self.bytes_down += len(data)
        yield data

    def _cut(self) -> None:
        self.was_cut.set()
        with self._lock:
            ends, self._open = self._open, set()
        for end in ends:
            _shut(end)

    def _freeze(self) -> None:
        self.was_frozen.set()
        self._thawed.wait()


def _shut(end: socket.socket) -> None:
    with contextlib.suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)
    end.close()
