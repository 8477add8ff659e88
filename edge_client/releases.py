"""Releases on a device: fetched as an adapter, or as the steps since the last one, checked, and kept between rounds."""

from __future__ import annotations

import dataclasses

import numpy as np

from edge_client.transport import Connection, Fetched
from wire import prng, scalars, spec
from wire.delta import Layout, Vector
from wire.errors import PayloadError, Reason
from wire.messages import ReleaseManifest
from wire.prng import Combine
from wire.run_spec import RunSpec
from wire.scalars import Directions, Step, Trajectory


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """A release on this device: `trajectory.adapter` is its adapter, `bytes` what fetching it took."""

    release: ReleaseManifest
    trajectory: Trajectory
    trail: str
    bytes: int


class Releases:
    """What a client holds of each run. A device that missed rounds fetches the shorter of their steps and the adapter."""

    def __init__(self, combine: Combine = prng.combine) -> None:
        self._held: dict[str, Held] = {}
        self._combine = combine

    def fetch(
        self, connection: Connection, run: RunSpec, layout: Layout, initial: Vector, version: int | None = None
    ) -> Held:
        """A release (None: the newest). `initial` is release 0's adapter, which every device can make itself.

        Raises PayloadError for bytes that are not what the release's manifest names.
        """
        if run.codec is not None or run.directions is None:
            return _whole(_of(run, connection.release(run.name, 4 * layout.size, version)), run, layout)
        held = self._held.get(run.digest)
        if held is None or (version is not None and held.release.version > version):
            held = _first(run, layout, initial)
        limit = max(8 * layout.size, 1 << 20)
        fetched = _of(run, connection.release(run.name, limit, version, held.release.version))
        if fetched.release.version == 0:
            _same(fetched.release.digest, held.release.digest, "release 0 is not the one this run's rules give")
            return held
        self._held[run.digest] = _advanced(held, fetched, run.directions, layout, self._combine)
        return self._held[run.digest]


def _of(run: RunSpec, fetched: Fetched) -> Fetched:
    """A release of this very run: a signed one of another run is not."""
    named = (fetched.release.run, fetched.release.spec)
    _same(repr(named), repr((run.name, run.digest)), "the coordinator answers with a release of another run")
    return fetched


def _whole(fetched: Fetched, run: RunSpec, layout: Layout) -> Held:
    """A release that is an adapter."""
    _same(spec.bytes_digest(fetched.data), fetched.release.adapter, "the adapter is not the one its release names")
    adapter = _vector(fetched.data, layout.size)
    start = Trajectory.start(run.directions or Directions(), layout, adapter, fetched.release.version)
    return Held(fetched.release, start, "", len(fetched.data))


def _first(run: RunSpec, layout: Layout, initial: Vector) -> Held:
    assert run.directions is not None, "a run of scalars has directions"
    digest = spec.bytes_digest(memoryview(initial.astype("<f4").data).cast("B"))
    release = ReleaseManifest.first(run, layout, digest)
    return Held(release, Trajectory.start(run.directions, layout, initial), release.digest, 0)


def _advanced(held: Held, fetched: Fetched, directions: Directions, layout: Layout, combine: Combine) -> Held:
    release, size = fetched.release, len(fetched.data)
    if not fetched.sizes and release.version != held.release.version:
        return Held(release, _snapshot(held, fetched, layout), release.trail or "", size)
    state, trail, at = held.trajectory, held.trail, 0
    for length in fetched.sizes:
        data = fetched.data[at : at + length]
        at += length
        state, trail = state.after(Step.parse(data, directions), combine), scalars.trail(trail, spec.bytes_digest(data))
    if directions.drawn == "pool":
        _same(spec.bytes_digest(fetched.data), release.step, "the pool is not the one its release names")
        trail = release.trail or ""
    _same(trail, release.trail, "the steps do not lead to this release")
    return Held(release, state, trail, size)


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
