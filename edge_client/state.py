"""What a device keeps across restarts, in one folder: its name, each run's codec state and last release, and an update not yet
confirmed.

An update is written down *before* it is sent, together with the codec state that follows from it; the receipt promotes
that state. A client that dies in between sends the same bytes again, so that an update is counted once and the error
feedback never forgets, nor counts twice, what the coordinator has.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from wire import spec
from wire.codecs import State
from wire.delta import Vector
from wire.durable import make_folder, sync_folder
from wire.errors import EdgetuneError, MachineError, PayloadError, Reason, UserError
from wire.messages import Contribution, ReleaseManifest, Task
from wire.run_spec import NAME, Cohort, RunSpec

try:
    import fcntl
except ImportError:  # Windows: no advisory locks in the standard library worth having; the folder is not locked there
    fcntl = None  # type: ignore[assignment]


@dataclasses.dataclass(frozen=True)
class Record:
    """What a device did in one run so far. Losses in nats a token, None before the first measurement."""

    spec: str = ""
    rounds: int = 0
    last_round: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    loss_first: float | None = None
    loss_last: float | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Pending:
    """An update that was written down and has no receipt yet; `version` is the release it starts from, and `own` the device's
    personal part of the adapter after it, float32."""

    contribution: Contribution
    payload: bytes
    codec_state: State
    version: int
    own: Vector | None = None


RANK = "rank.npz"
UNKNOWN = -1 << 62
"""The release of what was written down before its version was: older than all that anything is owed to."""


def owed(cohort: Cohort, then: int, now: int) -> bool:
    """Whether what an update from release `then` left unsent may go with one from release `now`.

    It was found at `then`, and after releases that the device had no part in it points elsewhere. In a round that is tried
    again the update itself never counted. A buffer takes updates of any start within its bound, and so what they left.
    """
    if cohort.mode == "async":
        return 0 <= now - then <= 1 + (cohort.max_staleness or 0)
    return now - then == 1


class DeviceState:
    """One device's folder. Raises MachineError where it cannot be written, UserError where another client has it."""

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder = folder
        with _writable(folder):
            make_folder(folder / "runs")
            self._lock = (folder / "lock").open("a")
        self._take_lock()
        self.device = self._named(name)

    def close(self) -> None:
        """Release the folder to other clients."""
        self._lock.close()

    def codec_state(self, run: RunSpec, version: int) -> State | None:
        """The codec state after the last confirmed update of this very run, for an update that starts from release
        `version`; None before the first, and where what it holds is no longer owed."""
        found = _read(self._run(run.name) / "codec.npz")
        if found is None or _text(found.pop("spec")) != run.digest:
            return None
        return found if owed(run.cohort, int(found.pop("version", UNKNOWN)), version) else None

    def own(self, run: RunSpec, first: Vector) -> Vector:
        """The personal part of this very run's adapter after the last confirmed update; `first` before there was one."""
        found = _read(self._run(run.name) / "own.npz")
        if found is None or _text(found["spec"]) != run.digest or found["own"].shape != first.shape:
            return first
        return found["own"].astype(np.float32, copy=False)

    def weights(self, run: RunSpec) -> tuple[float, float]:
        """What this device found best to weigh a run's shared pair and its own by; 1 and 1 before it looked."""
        found = _read(self._run(run.name) / "weights.npz")
        if found is None or _text(found["spec"]) != run.digest:
            return 1.0, 1.0
        shared, own = found["weights"].tolist()
        return shared, own

    def weigh(self, run: RunSpec, weights: tuple[float, float]) -> None:
        """Keep what was found."""
        _write(self._run(run.name) / "weights.npz", _npz({"spec": _bytes(run.digest), "weights": np.array(weights)}))

    def tunes(self, run: RunSpec, rank: int | None) -> None:
        """Keep the rank at which this device takes part in a run; None for the run's."""
        if tuned_rank(self.folder, run) != rank:
            _write(self._run(run.name) / RANK, _npz({"spec": _bytes(run.digest), "rank": np.array(rank or 0)}))

    def record(self, run: str) -> Record:
        try:
            return spec.parse(Record, json.loads((self._run(run) / "record.json").read_text()), "record")
        except FileNotFoundError:
            return Record()

    def fallen(self, run: RunSpec, loss: float) -> float:
        """How far, in nats, `loss` lies below the first that this device measured in this very run; 0 before there was one."""
        record = self.record(run.name)
        return record.loss_first - loss if record.spec == run.digest and record.loss_first is not None else 0.0

    def runs(self) -> list[str]:
        """The runs this device has a record of."""
        return sorted(path.parent.name for path in (self.folder / "runs").glob("*/record.json"))

    def prepare(self, pending: Pending, run: RunSpec) -> None:
        """Write an update down before it is sent."""
        arrays: State = {f"state:{key}": value for key, value in pending.codec_state.items()}
        arrays["payload"] = np.frombuffer(pending.payload, np.uint8)
        arrays["contribution"] = _bytes(spec.canonical(pending.contribution).decode())
        if pending.own is not None:
            arrays["own"] = pending.own
        arrays |= {"spec": _bytes(run.digest), "version": np.array(pending.version)}
        _write(self._run(run.name) / "pending.npz", _npz(arrays))

    def pending(self, run: RunSpec) -> Pending | None:
        """The update of this very run that has no receipt yet."""
        found = _read(self._run(run.name) / "pending.npz")
        if found is None or _text(found["spec"]) != run.digest:
            return None
        contribution = spec.parse(Contribution, json.loads(_text(found["contribution"])), "pending")
        codec_state = {key.removeprefix("state:"): v for key, v in found.items() if key.startswith("state:")}
        version = int(found.get("version", UNKNOWN))
        return Pending(contribution, found["payload"].tobytes(), codec_state, version, found.get("own"))

    def holds(self, task: Task) -> bool:
        """Whether an update of this very task is written down and has no receipt yet."""
        found = _read(self._run(task.run) / "pending.npz")
        if found is None or _text(found["spec"]) != task.spec_digest:
            return False
        mine = spec.parse(Contribution, json.loads(_text(found["contribution"])), "pending")
        return (mine.round, mine.attempt) == (task.round, task.attempt)

    def confirm(self, pending: Pending, run: RunSpec) -> None:
        """The receipt came: the pending codec state becomes the state. Safe to repeat after a crash at any point."""
        folder = self._run(run.name)
        if pending.codec_state:
            kept = pending.codec_state | {"spec": _bytes(run.digest), "version": np.array(pending.version)}
            _write(folder / "codec.npz", _npz(kept))
        if pending.own is not None and pending.own.size:
            _write(folder / "own.npz", _npz({"spec": _bytes(run.digest), "own": pending.own}))
        self._count(pending.contribution, run)
        (folder / "pending.npz").unlink(missing_ok=True)

    def discard(self, run: str) -> None:
        """The update will never be counted: forget it, and the codec state that would have followed."""
        (self._run(run) / "pending.npz").unlink(missing_ok=True)

    def saw(self, release: ReleaseManifest) -> None:
        """Remember a release, and refuse one that is older than one seen before: a run only goes forward.

        Raises PayloadError(ROLLED_BACK).
        """
        file = self._run(release.run) / "newest.json"
        newest = _number(file) if file.exists() else 0
        if release.version < newest:
            raise PayloadError(
                Reason.ROLLED_BACK,
                f"the coordinator goes back: release {release.version} of {release.run}, after release {newest}. If the run"
                f" was really created anew, `edgetune client leave --run {release.run}` forgets the old one",
            )
        if release.version > newest:
            _write(file, str(release.version).encode())

    def keep(self, release: ReleaseManifest, adapter: Vector) -> None:
        """Keep a release, so that a client that starts anew needs only what was added to it."""
        arrays: State = {"manifest": _bytes(spec.canonical(release).decode()), "adapter": adapter}
        _write(self._run(release.run) / "release.npz", _npz(arrays))

    def kept(self, run: str) -> tuple[ReleaseManifest, Vector] | None:
        """The release that was kept last, and its adapter as it was found. None where there is none that can be read."""
        try:
            found = _read(self._run(run) / "release.npz")
            return None if found is None else (ReleaseManifest.parse(_text(found["manifest"])), found["adapter"])
        except (EdgetuneError, KeyError):  # it can be fetched again
            return None

    def begin(self, task: Task) -> None:
        _write(self.folder / "task.json", json.dumps(dataclasses.asdict(task)).encode())

    def end(self) -> None:
        (self.folder / "task.json").unlink(missing_ok=True)

    def task(self) -> Task | None:
        """The task under way, or the one that a killed client left behind."""
        try:
            return spec.parse(Task, json.loads((self.folder / "task.json").read_text()), "task")
        except FileNotFoundError:
            return None

    def forget(self, run: str) -> None:
        """Remove everything kept of a run."""
        import shutil  # needed here alone: it brings three compressors

        shutil.rmtree(self._run(run), ignore_errors=True)

    def _count(self, done: Contribution, run: RunSpec) -> None:
        old = self.record(done.run)
        old = old if old.spec == run.digest else Record(run.digest)  # another run that has the same name
        if old.last_round >= done.round:
            return
        metrics = done.metrics
        new = Record(
            spec=run.digest,
            rounds=old.rounds + 1,
            last_round=done.round,
            bytes_up=old.bytes_up + metrics.bytes_up,
            bytes_down=old.bytes_down + metrics.bytes_down,
            loss_first=old.loss_first if old.loss_first is not None else metrics.loss_before,
            loss_last=metrics.loss_before if metrics.loss_before is not None else old.loss_last,
        )
        _write(self._run(done.run) / "record.json", spec.canonical(new))

    def _run(self, run: str) -> Path:
        if not NAME.fullmatch(run):
            raise UserError(f"{run!r} is not a run name")
        return self.folder / "runs" / run

    def _take_lock(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise UserError(
                f"{self.folder}: another client is using this state; give this one its own --name or --state"
            ) from error

    def _named(self, name: str | None) -> str:
        file = self.folder / "device"
        kept = file.read_text().strip() if file.exists() else None
        if name is not None and kept is not None and name != kept:
            raise UserError(f"{self.folder} belongs to device {kept!r}, not {name!r}; give another --state")
        device = kept or name or f"device-{secrets.token_hex(6)}"
        if not NAME.fullmatch(device):
            raise UserError(f"--name {device!r}: 1 to 64 of a-z 0-9 . _ -, starting with a letter or digit")
        if kept is None:
            _write(file, device.encode())
        return device


def tuned_rank(folder: Path, run: RunSpec) -> int | None:
    """The rank at which the device whose state is in `folder` last took part in this very run; None for the run's, and before it
    did. The file is whole at any time, so that nothing need be locked."""
    found = _read(folder / "runs" / run.name / RANK)
    if found is None or _text(found["spec"]) != run.digest:
        return None
    return int(found["rank"]) or None


@contextlib.contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MachineError(f"{path}: cannot keep state here: {error.strerror}") from error


def _write(path: Path, data: bytes) -> None:
    """All or nothing: aside, synced, renamed, and the name synced."""
    with _writable(path):
        make_folder(path.parent)
        aside = path.with_name(path.name + ".aside")
        with aside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync_folder(path.parent)


def _number(path: Path) -> int:
    try:
        return int(path.read_text())
    except (OSError, ValueError) as error:
        raise MachineError(f"{path}: damaged; `edgetune client leave --run` forgets this run: {error}") from error


def _npz(arrays: State) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]  # numpy's stub takes allow_pickle for one of the arrays
    return buffer.getvalue()


def _read(path: Path) -> State | None:
    if not path.exists():
        return None
    import zipfile  # needed here alone, by numpy too

    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise MachineError(f"{path}: damaged; remove it to start this run's codec state anew: {error}") from error


def _bytes(text: str) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(text.encode(), np.uint8)


def _text(array: np.ndarray[tuple[int, ...], np.dtype[np.uint8]]) -> str:
    return array.tobytes().decode()
