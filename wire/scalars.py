"""The scalar form of an update: a number for each of a run's directions. Seeds never travel; they follow from the run.

A device that measured directional derivatives sends what each direction is to be multiplied by; a release of a run
that tunes by scalars alone is the mean of those numbers; the adapter is what anybody makes of them (MeZO, arXiv 2305.17333;
FedKSeed, 2312.06353; DeComFL, 2405.15861; HiSo, 2506.02370). Multiples are integers in units of 2^-30.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
import struct
from typing import Literal

import numpy as np
import numpy.typing as npt

from wire import prng, spec
from wire.delta import Layout, Vector
from wire.errors import PayloadError, Reason
from wire.prng import Combine, Strand, Units
from wire.subspace import Basis, Subspace

MAGIC = b"ETS1"
STEP_MAGIC = b"ETR1"
NAME_BYTES = 8
UNIT_BITS = 30
"""A multiple of 1 is 2^30 units."""
LIMIT = 1 << 31
"""|multiple| < 2: training that asks for more has diverged."""
SCALE_BITS = 8
"""A curvature scale of 1 is 2^8."""
SCALE_RANGE = (1 << 6, 1 << 10)
"""Curvature may shorten a direction's entry four times, or lengthen it four times."""
_DTYPES = {8: "<i1", 16: "<i2", 32: "<i4"}


@dataclasses.dataclass(frozen=True)
class Directions:
    """Which directions a round measures, and how their multiples travel.

    `drawn` "round": the same `count` directions for every device of a round; "device": each device its own; "pool":
    `count` directions for the whole run, of which a device measures some. `bits` a multiple, with one exponent a
    payload. `curvature` is HiSo's ν: how fast the diagonal that scales directions follows the run; 0 for none. With
    `subspace` directions are of low rank.
    """

    drawn: Literal["round", "device", "pool"] = "round"
    count: int = 64
    bits: Literal[8, 16, 32] = 16
    curvature: float = 0.0
    subspace: Subspace | None = dataclasses.field(default=None, metadata=spec.LATER)

    def __post_init__(self) -> None:
        if not 1 <= self.count <= 65_536:
            raise ValueError("count must lie between 1 and 65,536")
        if not 0 <= self.curvature < 1:
            raise ValueError("curvature must lie in [0, 1)")
        if self.curvature and self.drawn != "round":
            raise ValueError("curvature needs directions drawn by round")
        if self.subspace and self.curvature:
            raise ValueError("a method with curvature (hiso) draws its directions entry by entry: leave subspace out")
        if self.subspace and self.drawn == "pool" and self.subspace.refresh:
            raise ValueError("a pool's directions are the run's: give its subspace refresh = 0")

    @functools.cached_property
    def digest(self) -> str:
        return spec.digest(self)

    def key(self, run_seed: int, number: int, device: str) -> int:
        """The 64-bit key of a device's directions in round `number`."""
        tag = {"round": f"round/{number}", "device": f"round/{number}/{device}", "pool": "pool"}[self.drawn]
        return int.from_bytes(hashlib.sha256(f"edgetune/{run_seed}/{tag}".encode()).digest()[:8], "little")

    def max_bytes(self) -> int:
        """The longest payload."""
        each = self.bits // 8 + (2 if self.drawn == "pool" else 0)
        return len(MAGIC) + 2 * NAME_BYTES + 3 + self.count * each


@dataclasses.dataclass(frozen=True, eq=False)
class Scalars:
    """One device's multiples: value · 2^-exponent for each direction, int32 [count]."""

    directions: Directions
    values: npt.NDArray[np.int32]
    exponent: int

    @classmethod
    def of(cls, directions: Directions, multiples: npt.NDArray[np.float64]) -> Scalars:
        """The nearest that `directions.bits` can say. Raises ValueError for multiples of 2 or more, or not finite."""
        peak = float(np.abs(multiples).max(initial=0.0))
        if not peak < LIMIT / 2**UNIT_BITS:
            raise ValueError("a multiple is 2 or more, or not finite")
        largest = 2 ** (directions.bits - 1) - 1
        exponent = UNIT_BITS if peak == 0 else min(UNIT_BITS, math.floor(math.log2(largest / peak)))
        values = np.clip(np.rint(multiples * 2.0**exponent), -largest, largest)
        return cls(directions, values.astype(np.int32), exponent)

    @property
    def units(self) -> Units:
        """The multiples as integers of 2^-30, int64 [count]."""
        return self.values.astype(np.int64) << (UNIT_BITS - self.exponent)

    def encode(self, layout: Layout) -> bytes:
        """The payload."""
        values = self.values.astype(_DTYPES[self.directions.bits])
        used = np.flatnonzero(values)
        if self.directions.drawn != "pool" and not 0 < len(used) * (2 + values.itemsize) < values.nbytes:
            return _header(layout, self.directions) + struct.pack("<BH", self.exponent, 0) + values.tobytes()
        if len(used) > 0xFFFF:
            raise ValueError("a payload names at most 65,535 directions")
        head = struct.pack("<BH", self.exponent, len(used))
        return _header(layout, self.directions) + head + used.astype("<u2").tobytes() + values[used].tobytes()


def is_scalars(payload: bytes | memoryview) -> bool:
    """Whether a payload is of the scalar form, by its first bytes."""
    return bytes(payload[: len(MAGIC)]) == MAGIC


def decode(payload: bytes | memoryview, directions: Directions, layout: Layout) -> Scalars:
    """What a device meant. Total: returns or raises PayloadError."""
    body = memoryview(payload)[len(MAGIC) + 2 * NAME_BYTES :]
    _check_header(payload, directions, layout)
    if len(body) < 3:
        raise PayloadError(Reason.BAD_PAYLOAD, "the payload ends before its first number")
    exponent, named = struct.unpack_from("<BH", body)
    if exponent > UNIT_BITS:
        raise PayloadError(Reason.BAD_PAYLOAD, f"an exponent is at most {UNIT_BITS}, not {exponent}")
    values = _values(body[3:], named, directions)
    scalars = Scalars(directions, values, exponent)
    if scalars.values.size and int(np.abs(scalars.units).max()) >= LIMIT:
        raise PayloadError(Reason.OUT_OF_RANGE, "a multiple is 2 or more: training has diverged")
    return scalars


def _values(body: memoryview, named: int, directions: Directions) -> npt.NDArray[np.int32]:
    dtype = np.dtype(_DTYPES[directions.bits])
    by_name = directions.drawn == "pool" or named > 0
    expected = named * (2 + dtype.itemsize) if by_name else directions.count * dtype.itemsize
    if len(body) != expected:
        raise PayloadError(Reason.BAD_PAYLOAD, f"expected {expected} bytes of numbers, got {len(body)}")
    if not by_name:
        return np.frombuffer(body, dtype).astype(np.int32)
    indices = np.frombuffer(body, "<u2", named).astype(np.int64)
    if named and (np.any(np.diff(indices) <= 0) or indices[-1] >= directions.count):
        raise PayloadError(
            Reason.BAD_PAYLOAD, "directions must be named once, in order, and be of the round's or the pool's"
        )
    values = np.zeros(directions.count, np.int32)
    values[indices] = np.frombuffer(body[2 * named :], dtype)
    return values


def _header(layout: Layout, directions: Directions) -> bytes:
    return MAGIC + b"".join(bytes.fromhex(name)[:NAME_BYTES] for name in (layout.digest, directions.digest))


def _check_header(payload: bytes | memoryview, directions: Directions, layout: Layout) -> None:
    wanted = _header(layout, directions)
    found = bytes(payload[: len(wanted)])
    first, second = len(MAGIC), len(MAGIC) + NAME_BYTES
    if len(found) < len(wanted) or found[:first] != MAGIC:
        raise PayloadError(Reason.BAD_PAYLOAD, "not an update in scalars: the header is missing")
    if found[first:second] != wanted[first:second]:
        raise PayloadError(Reason.WRONG_LAYOUT, "the update was made for another layout")
    if found[second:] != wanted[second:]:
        raise PayloadError(Reason.WRONG_CODEC, "the update was made along other directions than this run's")


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """What a release of a scalar run is: strands of multiples in units. With a pool there is one strand, the run's sum."""

    strands: tuple[Strand, ...]

    def to_bytes(self) -> bytes:
        """Magic, count of strands (u32), entries a strand (u32); then each strand's key (u64) and its multiples (i32)."""
        entries = len(self.strands[0][1]) if self.strands else 0
        parts = [STEP_MAGIC, struct.pack("<II", len(self.strands), entries)]
        for key, units in self.strands:
            parts += [struct.pack("<Q", key), np.clip(units, 1 - LIMIT, LIMIT - 1).astype("<i4").tobytes()]
        return b"".join(parts)

    @classmethod
    def parse(cls, data: bytes | memoryview, directions: Directions) -> Step:
        """Raises PayloadError(BAD_PAYLOAD) for bytes that `to_bytes` did not write for `directions`."""
        each = 8 + 4 * directions.count
        if len(data) < 12 or bytes(data[:4]) != STEP_MAGIC:
            raise PayloadError(Reason.BAD_PAYLOAD, "not a step of a scalar run")
        strands, entries = struct.unpack_from("<II", data, 4)
        if (strands and entries != directions.count) or len(data) != 12 + strands * each:
            raise PayloadError(Reason.BAD_PAYLOAD, "a step of another length than it says")
        found = []
        for at in range(12, len(data), each):
            units = np.frombuffer(data, "<i4", directions.count, at + 8).astype(np.int64)
            found.append((struct.unpack_from("<Q", data, at)[0], units))
        return cls(tuple(found))


@dataclasses.dataclass(frozen=True, eq=False)
class Trajectory:
    """Where a run of scalars stands: its first adapter, its present one, and the curvature that scales directions.

    float32 [layout.size] each; `curvature` is None where the run uses none; `sums` are a pool's multiples, int64 [count];
    `version` is the release that `adapter` is of, and `moved` what the last step added to it, None where that is not known.
    Every operation is one IEEE rounding an entry, so that numpy, numba and torch walk the same way.
    """

    directions: Directions
    layout: Layout
    initial: Vector
    adapter: Vector
    curvature: Vector | None
    version: int = 0
    sums: Units | None = None
    moved: Vector | None = None

    @classmethod
    def start(cls, directions: Directions, layout: Layout, initial: Vector, version: int = 0) -> Trajectory:
        curvature = np.ones_like(initial) if directions.curvature else None
        return cls(directions, layout, initial, initial, curvature, version)

    def scale(self) -> npt.NDArray[np.int64] | None:
        """What each entry of a direction is multiplied by, in 1/256; None for 1. round(256 / sqrt(h)), within 1/4 and 4."""
        if self.curvature is None:
            return None
        unit = np.float32(1 << SCALE_BITS)
        return np.clip(np.rint(unit / np.sqrt(self.curvature)), *SCALE_RANGE).astype(np.int64)

    def direction(self, key: int, number: int) -> Vector:
        """A direction as this run perturbs along it, float32 [size]."""
        basis = self._basis()
        if basis is not None:
            return basis.widened(prng.signs(key, number, basis.drawn)).astype(np.float32)
        drawn = prng.signs(key, number, len(self.initial)).astype(np.float32)
        scale = self.scale()
        return drawn if scale is None else drawn * (scale.astype(np.float32) / np.float32(1 << SCALE_BITS))

    def delta(self, step: Step, combine: Combine = prng.combine) -> Vector:
        """What `step` adds to the adapter (with a pool: to the first adapter), float32 [size]."""
        basis = self._basis()
        if basis is not None:
            return self.scaled(basis.widened(combine(step.strands, basis.drawn)))
        return self.scaled(combine(step.strands, len(self.initial)))

    def _basis(self) -> Basis | None:
        subspace = self.directions.subspace
        return None if subspace is None else subspace.basis(self.layout, self.version)

    def scaled(self, total: Units) -> Vector:
        scale = self.scale()
        if scale is None:
            return total.astype(np.float32) * np.float32(2.0**-UNIT_BITS)
        return (total * scale).astype(np.float32) * np.float32(2.0 ** -(UNIT_BITS + SCALE_BITS))

    def after(self, step: Step, combine: Combine = prng.combine) -> Trajectory:
        """The trajectory one release later."""
        delta, version = self.delta(step, combine), self.version + 1
        if self.directions.drawn == "pool":
            adapter, sums = self.initial + delta, step.strands[0][1]
            return dataclasses.replace(self, adapter=adapter, sums=sums, version=version, moved=adapter - self.adapter)
        adapter, curvature = self.adapter + delta, self._followed(delta, step)
        return dataclasses.replace(self, adapter=adapter, curvature=curvature, version=version, moved=delta)

    def _followed(self, delta: Vector, step: Step) -> Vector | None:
        """h + ν (Δ² / Σ multiple² - h): along independent signs, Δ² has Σ multiple² as its mean, so h stays near 1."""
        if self.curvature is None:
            return None
        energy = mean_square(step)
        if energy == 0:
            return self.curvature
        rate = np.float32(self.directions.curvature)
        floor = np.float32(1e-4)
        return np.maximum(self.curvature + rate * (delta * delta / energy - self.curvature), floor)


def mean_square(step: Step) -> np.float32:
    """Σ multiple² of a step, from exact integers."""
    total = sum(int(u) * int(u) for _, units in step.strands for u in units)
    return np.float32(total / (1 << 2 * UNIT_BITS))
