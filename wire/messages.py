"""What travels, as frozen dataclasses. Each has `to_proto` and `from_proto`; nothing else ever sees a protobuf message."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any, Literal

from protos.v1 import federation_pb2 as pb
from wire import spec
from wire.delta import Layout
from wire.errors import PayloadError, Reason
from wire.run_spec import DIGEST, NAME, RunSpec
from wire.spec import LATER

PROTOCOL = 1
CHUNK_BYTES = 1 << 20
"""Bytes of data in one chunk of a stream; also the largest payload that travels in one unary call."""
PART_BYTES = 256 << 10
"""Bytes of an upload that a client sends at a time, twice as many while the link is quick: the most that are ever sent
twice."""
MAX_MESSAGE_BYTES = 4 << 20
"""The largest gRPC message either end takes; everything bigger is cut in chunks."""
MAX_WEIGHT = 65_535
MAX_WAIT_S = 60.0

Kind = Literal["train", "evaluate"]
RunState = Literal["running", "paused", "done", "failed", "stopped"]
ENDED = ("done", "failed", "stopped")
_KINDS: dict[int, Kind] = {pb.TASK_KIND_TRAIN: "train", pb.TASK_KIND_EVALUATE: "evaluate"}
Control = Literal["pause", "resume", "stop"]
ACTIONS: dict[int, Control] = {
    pb.RUN_ACTION_PAUSE: "pause",
    pb.RUN_ACTION_RESUME: "resume",
    pb.RUN_ACTION_STOP: "stop",
}
"""What a person can do with a run that is going."""
MAX_REASON = 200
"""Characters of the reason that is kept with it."""
_KIND_NUMBERS = {name: number for number, name in _KINDS.items()}


@dataclasses.dataclass(frozen=True)
class Task:
    """What a device is handed. `deadline_s` counts from the answer."""

    run: str
    round: int
    attempt: int
    kind: Kind
    release_version: int
    release_digest: str
    spec_digest: str
    layout_digest: str
    deadline_s: float

    def to_proto(self) -> pb.Task:
        table = dataclasses.asdict(self) | {"kind": _KIND_NUMBERS[self.kind]}
        return pb.Task(**table)

    @classmethod
    def from_proto(cls, message: pb.Task) -> Task:
        if message.kind not in _KINDS:
            raise PayloadError(Reason.BAD_REQUEST, "task of an unknown kind: this client is older than the coordinator")
        fields = {f.name: getattr(message, f.name) for f in dataclasses.fields(cls)}
        return cls(**fields | {"kind": _KINDS[message.kind]})


@dataclasses.dataclass(frozen=True)
class Wait:
    """Nothing to do now."""

    retry_after_s: float
    active_runs: int


@dataclasses.dataclass(frozen=True)
class Finished:
    """Every run that was asked for has ended."""

    runs: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Metrics:
    """What a device says of its own work: numbers only. Losses in nats a token, None where not measured."""

    loss_before: float | None = None
    loss_after: float | None = None
    held_out_tokens: int = 0
    train_loss: float = 0.0
    train_tokens: int = 0
    steps: int = 0
    train_seconds: float = 0.0
    peak_rss_bytes: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    forwards: int = 0

    def __post_init__(self) -> None:
        floats = (self.loss_before or 0.0, self.loss_after or 0.0, self.train_loss, self.train_seconds)
        if not all(math.isfinite(x) for x in floats):
            raise ValueError("metrics must be finite")

    def to_proto(self) -> pb.Metrics:
        return pb.Metrics(**{k: v for k, v in dataclasses.asdict(self).items() if v is not None})

    @classmethod
    def from_proto(cls, message: pb.Metrics) -> Metrics:
        table = {f.name: getattr(message, f.name) for f in dataclasses.fields(cls)}
        for name in ("loss_before", "loss_after"):
            table[name] = table[name] if message.HasField(name) else None
        return cls(**table)


@dataclasses.dataclass(frozen=True)
class Contribution:
    """One device's part in a round. For an evaluation `digest` is empty and `size` 0.

    `staleness` never travels: the ledger says it of an update that it took into a buffer.
    """

    device: str
    run: str
    round: int
    attempt: int
    digest: str
    size: int
    weight: int
    base_digest: str
    release_digest: str
    metrics: Metrics
    staleness: int | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.device) or not NAME.fullmatch(self.run):
            raise ValueError("device and run must be 1 to 64 of a-z 0-9 . _ -")
        if self.digest and not DIGEST.fullmatch(self.digest):
            raise ValueError("digest must be 64 hexadecimal digits")
        if not 1 <= self.weight <= MAX_WEIGHT:
            raise ValueError(f"weight must lie between 1 and {MAX_WEIGHT}")
        if (self.size > 0) != bool(self.digest):
            raise ValueError("a payload has both a size and a digest, an evaluation neither")

    def to_proto(self) -> pb.Contribution:
        table = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "staleness"}
        return pb.Contribution(**table | {"metrics": self.metrics.to_proto()})

    @classmethod
    def from_proto(cls, message: pb.Contribution) -> Contribution:
        """Raises PayloadError (BAD_REQUEST) for anything a well-behaved device would not send."""
        names = [f.name for f in dataclasses.fields(cls) if f.name != "staleness"]
        table: dict[str, Any] = {name: getattr(message, name) for name in names}
        table["weight"] = min(table["weight"], MAX_WEIGHT)
        try:
            return cls(**table | {"metrics": Metrics.from_proto(message.metrics)})
        except ValueError as error:
            raise PayloadError(Reason.BAD_REQUEST, str(error)) from error


@dataclasses.dataclass(frozen=True)
class Receipt:
    """Proof that a contribution is stored and counted; the same for every repetition of the same contribution."""

    run: str
    round: int
    attempt: int
    device: str
    digest: str

    def to_proto(self) -> pb.Receipt:
        return pb.Receipt(**dataclasses.asdict(self))

    @classmethod
    def from_proto(cls, message: pb.Receipt) -> Receipt:
        return cls(**{f.name: getattr(message, f.name) for f in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class Share:
    """One contribution as a release names it. In a buffer: with the round of its task, which its directions follow from,
    and how many releases old its start was, which its weight follows from."""

    device: str
    digest: str
    weight: int
    round: int | None = dataclasses.field(default=None, metadata=LATER)
    staleness: int | None = dataclasses.field(default=None, metadata=LATER)


@dataclasses.dataclass(frozen=True)
class ReleaseManifest:
    """A published adapter version. It names everything it was made of, so that anybody can make it again.

    `adapter` and `optimizer_state` are digests of stored vectors (float32, little-endian); `parent` is the digest of
    the release before, None for release 0. In a run of scalars alone, releases after 0 have no adapter but a `step`, the
    digest of a stored `wire.scalars.Step`. In a run with a downlink they have an adapter and the `delta` that leads to it
    from the one before, coded; `residual` is the vector that the codec did not send yet, and `shares` the digest of the stored
    list of contributions, which then are not in the manifest: it is as long for a thousand devices as for one. The `trail`
    chains all steps, or all coded deltas, so far.
    """

    run: str
    version: int
    spec: str
    layout: str
    parent: str | None
    adapter: str | None
    optimizer_state: str | None
    contributions: tuple[Share, ...]
    step: str | None = dataclasses.field(default=None, metadata=LATER)
    trail: str | None = dataclasses.field(default=None, metadata=LATER)
    delta: str | None = dataclasses.field(default=None, metadata=LATER)
    residual: str | None = dataclasses.field(default=None, metadata=LATER)
    shares: str | None = dataclasses.field(default=None, metadata=LATER)
    schema: str = "edgetune-release-1"

    @property
    def digest(self) -> str:
        return spec.digest(self)

    @property
    def blobs(self) -> tuple[str, ...]:
        """The digests of all stored bytes that are of this release."""
        named = (self.adapter, self.optimizer_state, self.step, self.delta, self.residual, self.shares)
        return tuple(filter(None, named))

    def trail_to(self, link: str) -> str:
        """The trail of the release that the step or coded delta of digest `link` leads to from this one."""
        return trail(self.trail or self.digest, link)

    @classmethod
    def first(cls, run: RunSpec, layout: Layout, adapter: str) -> ReleaseManifest:
        """Release 0: what a run is created with. Its digest begins the trail."""
        return cls(run.name, 0, run.digest, layout.digest, None, adapter, None, ())

    @classmethod
    def parse(cls, text: str | bytes) -> ReleaseManifest:
        try:
            return spec.parse(cls, json.loads(text), "release")
        except ValueError as error:
            raise PayloadError(Reason.BAD_PAYLOAD, f"release manifest is not JSON: {error}") from error


def trail(before: str, link: str) -> str:
    """The hash chain of what leads to a release, from the digest of each link: it proves a history without its manifests."""
    return hashlib.sha256(f"{before}{link}".encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class DeviceStanding:
    """An enrolled device as administrators see it. Times in Unix seconds."""

    name: str
    owner: str
    state: str
    enrolled_at: float
    certificate_ends_at: float
    alarm: str

    @classmethod
    def from_proto(cls, message: pb.Device) -> DeviceStanding:
        return cls(**{f.name: getattr(message, f.name) for f in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class AdministratorStanding:
    """An administrator as others see it. Times in Unix seconds."""

    name: str
    state: str
    enrolled_at: float
    certificate_ends_at: float

    @classmethod
    def from_proto(cls, message: pb.Administrator) -> AdministratorStanding:
        return cls(**{f.name: getattr(message, f.name) for f in dataclasses.fields(cls)})


@dataclasses.dataclass(frozen=True)
class ReleaseStatus:
    """A release as people see it. Held-out loss: of this release, over the devices that measured it, by tokens."""

    version: int
    digest: str
    contributions: int
    published_at: float
    held_out_loss: float | None
    held_out_tokens: int
    local_loss: float | None
    train_loss: float | None
    bytes_up: int
    bytes_down: int


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """Where a run stands. `refused` counts refusals by reason over the whole run; times in Unix seconds."""

    name: str
    state: RunState
    round: int
    rounds: int
    attempt: int
    kind: Kind
    goal: int
    minimum: int
    offered: int
    accepted: int
    deadline_at: float
    parameters: int
    spec_digest: str
    base_digest: str
    refused: dict[str, int]
    releases: tuple[ReleaseStatus, ...]
    detail: str = ""

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    def to_proto(self) -> pb.RunStatus:
        return pb.RunStatus(status_json=spec.canonical(self).decode())

    @classmethod
    def from_proto(cls, message: pb.RunStatus) -> RunStatus:
        return spec.told(cls, json.loads(message.status_json), "status")
