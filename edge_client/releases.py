"""Releases on a device: fetched as an adapter, or as what was added since the last one, checked, and kept between rounds."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import numpy as np

from edge_client.transport import Connection, Fetched
from wire import prng, spec
from wire.delta import Layout, Vector
from wire.errors import PayloadError, Reason
from wire.messages import ReleaseManifest, trail
from wire.prng import Combine
from wire.run_spec import Downlink, RunSpec
from wire.scalars import Directions, Step, Trajectory


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """A release on this device: `trajectory.adapter` is its adapter, `bytes` what fetching it took."""

    release: ReleaseManifest
    trajectory: Trajectory
    trail: str
    bytes: int


class Shelf(Protocol):
    """Where the newest release of a run outlives the process: `edge_client.state.DeviceState`."""

    def keep(self, release: ReleaseManifest, adapter: Vector) -> None: ...

    def kept(self, run: str) -> tuple[ReleaseManifest, Vector] | None: ...


class Releases:
    """What a client holds of each run. A device that missed rounds fetches the shorter of what was added and the adapter."""

    def __init__(self, combine: Combine = prng.combine, shelf: Shelf | None = None) -> None:
        self._held: dict[str, Held] = {}
        self._combine, self._shelf = combine, shelf

    def fetch(
        self, connection: Connection, run: RunSpec, layout: Layout, initial: Vector, version: int | None = None
    ) -> Held:
        """A release (None: the newest). `initial` is release 0's adapter, which every device can make itself, but in a run that
        starts from another one.

        Raises PayloadError for bytes that are not what the release's manifest names.
        """
        if run.downlink is None and (run.codec is not None or run.directions is None):
            return _whole(_of(run, connection.release(run.name, 4 * layout.size, version)), run, layout)
        held = self._held.get(run.digest) or (self._kept(run, layout) if run.downlink else None)
        known = held
        if held is None or (version is not None and held.release.version > version):
            held = _first(run, layout, initial) if run.start is None else _begun(connection, run, layout)
        if run.downlink is None:
            now = self._stepped(connection, run, layout, held, version)
        else:
            now = _chained(connection, run, layout, held, version, run.downlink)
        if held is not known and now is not held:
            now = dataclasses.replace(now, bytes=now.bytes + held.bytes)
        if run.downlink and self._shelf and now.release != held.release:
            self._shelf.keep(now.release, now.trajectory.adapter)
        self._held[run.digest] = now
        return now

    def _kept(self, run: RunSpec, layout: Layout) -> Held | None:
        """What another process of this device held of this very run, if it is whole."""
        release, adapter = (self._shelf and self._shelf.kept(run.name)) or (None, None)
        if release is None or adapter is None or (release.spec, digest_of(adapter)) != (run.digest, release.adapter):
            return None
        return _holding(release, run, layout, adapter, 0)

    def _stepped(self, connection: Connection, run: RunSpec, layout: Layout, held: Held, version: int | None) -> Held:
        limit = max(8 * layout.size, 1 << 20)
        fetched = _of(run, connection.release(run.name, limit, version, held.release.version))
        if fetched.release.version == 0:
            _same(fetched.release.digest, held.release.digest, "release 0 is not the one this run's rules give")
            return held
        assert run.directions is not None, "a run of scalars has directions"
        return _advanced(held, fetched, run.directions, layout, self._combine)


def _chained(
    connection: Connection, run: RunSpec, layout: Layout, held: Held, version: int | None, by: Downlink
) -> Held:
    """By coded deltas from what is held, or as an adapter, whichever the coordinator finds shorter; as an adapter too where
    the deltas are damaged, or do not lead from what is held to what the manifest names."""
    limit = 4 * layout.size
    fetched = _of(run, connection.release(run.name, limit, version, held.release.version))
    try:
        return _walked(held, fetched, run, layout, by)
    except PayloadError:
        whole = _whole(_of(run, connection.release(run.name, limit, version)), run, layout)
        return dataclasses.replace(whole, bytes=whole.bytes + len(fetched.data))


def _walked(held: Held, fetched: Fetched, run: RunSpec, layout: Layout, by: Downlink) -> Held:
    """The digests of all deltas are checked before the first is decoded, and that of the adapter at the end."""
    release, length = fetched.release, len(fetched.sizes)
    if length == 0 and release.version != held.release.version:
        return _whole(fetched, run, layout)
    if length > by.longest_chain:
        raise PayloadError(Reason.BAD_SIZE, f"a chain of {length} deltas; this run's longest has {by.longest_chain}")
    reached = held.trail
    for link in fetched.links:
        reached = trail(reached, spec.bytes_digest(link))
    _same(reached, _trail(release), "the deltas do not lead to this release")
    adapter, codec = held.trajectory.adapter, by.chain()
    for link in fetched.links:
        adapter = adapter + codec.decode(link, layout).vector
    _same(digest_of(adapter), release.adapter, "the adapter is not the one its release names")
    return _holding(release, run, layout, adapter, len(fetched.data))


def _of(run: RunSpec, fetched: Fetched) -> Fetched:
    """A release of this very run: a signed one of another run is not."""
    named = (fetched.release.run, fetched.release.spec)
    _same(repr(named), repr((run.name, run.digest)), "the coordinator answers with a release of another run")
    return fetched


def _whole(fetched: Fetched, run: RunSpec, layout: Layout) -> Held:
    """A release that is an adapter."""
    _same(spec.bytes_digest(fetched.data), fetched.release.adapter, "the adapter is not the one its release names")
    return _holding(fetched.release, run, layout, _vector(fetched.data, layout.size), len(fetched.data))


def _holding(release: ReleaseManifest, run: RunSpec, layout: Layout, adapter: Vector, size: int) -> Held:
    start = Trajectory.start(run.directions or Directions(), layout, adapter, release.version)
    return Held(release, start, _trail(release), size)


def _trail(release: ReleaseManifest) -> str:
    return release.trail or release.digest


def _first(run: RunSpec, layout: Layout, initial: Vector) -> Held:
    return _holding(ReleaseManifest.first(run, layout, digest_of(initial)), run, layout, initial, 0)


def _begun(connection: Connection, run: RunSpec, layout: Layout) -> Held:
    """Release 0 of a run that starts from an adapter of its own."""
    held = _whole(_of(run, connection.release(run.name, 4 * layout.size, 0)), run, layout)
    _same(held.release.adapter, run.start, "release 0 is not the adapter that the run starts from")
    return held


def digest_of(adapter: Vector) -> str:
    """The SHA-256 that a release names its adapter by: of float32, little-endian."""
    return spec.bytes_digest(memoryview(adapter.astype("<f4").data).cast("B"))


def _advanced(held: Held, fetched: Fetched, directions: Directions, layout: Layout, combine: Combine) -> Held:
    release, size = fetched.release, len(fetched.data)
    if not fetched.sizes and release.version != held.release.version:
        return Held(release, _snapshot(held, fetched, layout), _trail(release), size)
    state, reached = held.trajectory, held.trail
    for data in fetched.links:
        state, reached = state.after(Step.parse(data, directions), combine), trail(reached, spec.bytes_digest(data))
    if directions.drawn == "pool":
        _same(spec.bytes_digest(fetched.data), release.step, "the pool is not the one its release names")
        reached = _trail(release)
    _same(reached, _trail(release), "the steps do not lead to this release")
    return Held(release, state, reached, size)


def _snapshot(held: Held, fetched: Fetched, layout: Layout) -> Trajectory:
    """An adapter and its curvature from the coordinator's own replay: no manifest names them."""
    start = held.trajectory
    cut = 4 * layout.size
    adapter = _vector(fetched.data[:cut], layout.size)
    curvature = None if start.curvature is None else _vector(fetched.data[cut:], layout.size)
    if len(fetched.data) != cut * (1 if curvature is None else 2):
        raise PayloadError(Reason.BAD_SIZE, "a snapshot of another length than its layout says")
    version = fetched.release.version
    return dataclasses.replace(start, adapter=adapter, curvature=curvature, version=version, moved=None)


def _vector(data: memoryview, size: int) -> Vector:
    if len(data) != 4 * size:
        raise PayloadError(Reason.BAD_SIZE, f"an adapter of this layout has {4 * size} bytes, not {len(data)}")
    return np.frombuffer(data, "<f4")


def _same(found: str | None, wanted: str | None, otherwise: str) -> None:
    if found != wanted:
        raise PayloadError(Reason.BAD_DIGEST, otherwise)
