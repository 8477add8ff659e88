from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TaskKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_KIND_UNSPECIFIED: _ClassVar[TaskKind]
    TASK_KIND_TRAIN: _ClassVar[TaskKind]
    TASK_KIND_EVALUATE: _ClassVar[TaskKind]

class RunAction(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    RUN_ACTION_UNSPECIFIED: _ClassVar[RunAction]
    RUN_ACTION_PAUSE: _ClassVar[RunAction]
    RUN_ACTION_RESUME: _ClassVar[RunAction]
    RUN_ACTION_STOP: _ClassVar[RunAction]
TASK_KIND_UNSPECIFIED: TaskKind
TASK_KIND_TRAIN: TaskKind
TASK_KIND_EVALUATE: TaskKind
RUN_ACTION_UNSPECIFIED: RunAction
RUN_ACTION_PAUSE: RunAction
RUN_ACTION_RESUME: RunAction
RUN_ACTION_STOP: RunAction

class CheckInRequest(_message.Message):
    __slots__ = ("device", "runs", "wait_s", "protocol", "edition")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    RUNS_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    EDITION_FIELD_NUMBER: _ClassVar[int]
    device: str
    runs: _containers.RepeatedScalarFieldContainer[str]
    wait_s: float
    protocol: int
    edition: int
    def __init__(self, device: _Optional[str] = ..., runs: _Optional[_Iterable[str]] = ..., wait_s: _Optional[float] = ..., protocol: _Optional[int] = ..., edition: _Optional[int] = ...) -> None: ...

class CheckInReply(_message.Message):
    __slots__ = ("task", "wait", "finished")
    TASK_FIELD_NUMBER: _ClassVar[int]
    WAIT_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    task: Task
    wait: Wait
    finished: Finished
    def __init__(self, task: _Optional[_Union[Task, _Mapping]] = ..., wait: _Optional[_Union[Wait, _Mapping]] = ..., finished: _Optional[_Union[Finished, _Mapping]] = ...) -> None: ...

class Wait(_message.Message):
    __slots__ = ("retry_after_s", "active_runs")
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    ACTIVE_RUNS_FIELD_NUMBER: _ClassVar[int]
    retry_after_s: float
    active_runs: int
    def __init__(self, retry_after_s: _Optional[float] = ..., active_runs: _Optional[int] = ...) -> None: ...

class Finished(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, runs: _Optional[_Iterable[str]] = ...) -> None: ...

class Task(_message.Message):
    __slots__ = ("run", "round", "attempt", "kind", "release_version", "release_digest", "spec_digest", "layout_digest", "deadline_s")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    RELEASE_VERSION_FIELD_NUMBER: _ClassVar[int]
    RELEASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    SPEC_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    attempt: int
    kind: TaskKind
    release_version: int
    release_digest: str
    spec_digest: str
    layout_digest: str
    deadline_s: float
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., kind: _Optional[_Union[TaskKind, str]] = ..., release_version: _Optional[int] = ..., release_digest: _Optional[str] = ..., spec_digest: _Optional[str] = ..., layout_digest: _Optional[str] = ..., deadline_s: _Optional[float] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("manifest_json", "signature")
    MANIFEST_JSON_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    manifest_json: str
    signature: str
    def __init__(self, manifest_json: _Optional[str] = ..., signature: _Optional[str] = ...) -> None: ...

class FetchReleaseRequest(_message.Message):
    __slots__ = ("run", "version", "latest", "steps_after")
    RUN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    LATEST_FIELD_NUMBER: _ClassVar[int]
    STEPS_AFTER_FIELD_NUMBER: _ClassVar[int]
    run: str
    version: int
    latest: bool
    steps_after: int
    def __init__(self, run: _Optional[str] = ..., version: _Optional[int] = ..., latest: _Optional[bool] = ..., steps_after: _Optional[int] = ...) -> None: ...

class ReleaseChunk(_message.Message):
    __slots__ = ("release", "step_bytes", "data")
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    STEP_BYTES_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    release: Release
    step_bytes: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    def __init__(self, release: _Optional[_Union[Release, _Mapping]] = ..., step_bytes: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ...) -> None: ...

class Metrics(_message.Message):
    __slots__ = ("loss_before", "loss_after", "held_out_tokens", "train_loss", "train_tokens", "steps", "train_seconds", "peak_rss_bytes", "bytes_up", "bytes_down", "forwards")
    LOSS_BEFORE_FIELD_NUMBER: _ClassVar[int]
    LOSS_AFTER_FIELD_NUMBER: _ClassVar[int]
    HELD_OUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_LOSS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    TRAIN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PEAK_RSS_BYTES_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    FORWARDS_FIELD_NUMBER: _ClassVar[int]
    loss_before: float
    loss_after: float
    held_out_tokens: int
    train_loss: float
    train_tokens: int
    steps: int
    train_seconds: float
    peak_rss_bytes: int
    bytes_up: int
    bytes_down: int
    forwards: int
    def __init__(self, loss_before: _Optional[float] = ..., loss_after: _Optional[float] = ..., held_out_tokens: _Optional[int] = ..., train_loss: _Optional[float] = ..., train_tokens: _Optional[int] = ..., steps: _Optional[int] = ..., train_seconds: _Optional[float] = ..., peak_rss_bytes: _Optional[int] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., forwards: _Optional[int] = ...) -> None: ...

class Contribution(_message.Message):
    __slots__ = ("device", "run", "round", "attempt", "digest", "size", "weight", "base_digest", "release_digest", "metrics")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    WEIGHT_FIELD_NUMBER: _ClassVar[int]
    BASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    RELEASE_DIGEST_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
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
    def __init__(self, device: _Optional[str] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., digest: _Optional[str] = ..., size: _Optional[int] = ..., weight: _Optional[int] = ..., base_digest: _Optional[str] = ..., release_digest: _Optional[str] = ..., metrics: _Optional[_Union[Metrics, _Mapping]] = ...) -> None: ...

class SubmitRequest(_message.Message):
    __slots__ = ("contribution", "payload")
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    contribution: Contribution
    payload: bytes
    def __init__(self, contribution: _Optional[_Union[Contribution, _Mapping]] = ..., payload: _Optional[bytes] = ...) -> None: ...

class UploadPart(_message.Message):
    __slots__ = ("upload", "device", "offset", "digest", "crc32", "data")
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    upload: str
    device: str
    offset: int
    digest: str
    crc32: int
    data: bytes
    def __init__(self, upload: _Optional[str] = ..., device: _Optional[str] = ..., offset: _Optional[int] = ..., digest: _Optional[str] = ..., crc32: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadState(_message.Message):
    __slots__ = ("upload", "offset", "receipt", "crc32")
    UPLOAD_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    upload: str
    offset: int
    receipt: Receipt
    crc32: bool
    def __init__(self, upload: _Optional[str] = ..., offset: _Optional[int] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ..., crc32: _Optional[bool] = ...) -> None: ...

class UploadChunk(_message.Message):
    __slots__ = ("digest", "size", "data")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    digest: str
    size: int
    data: bytes
    def __init__(self, digest: _Optional[str] = ..., size: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class UploadReply(_message.Message):
    __slots__ = ("digest",)
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    digest: str
    def __init__(self, digest: _Optional[str] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("run", "round", "attempt", "device", "digest")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    attempt: int
    device: str
    digest: str
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., device: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("device", "run", "round", "attempt")
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    device: str
    run: str
    round: int
    attempt: int
    def __init__(self, device: _Optional[str] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class LeaveReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class CreateRunRequest(_message.Message):
    __slots__ = ("spec_json", "layout_json", "adapter_digest")
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_JSON_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    spec_json: str
    layout_json: str
    adapter_digest: str
    def __init__(self, spec_json: _Optional[str] = ..., layout_json: _Optional[str] = ..., adapter_digest: _Optional[str] = ...) -> None: ...

class GetRunRequest(_message.Message):
    __slots__ = ("run",)
    RUN_FIELD_NUMBER: _ClassVar[int]
    run: str
    def __init__(self, run: _Optional[str] = ...) -> None: ...

class ControlRunRequest(_message.Message):
    __slots__ = ("run", "action", "reason")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ACTION_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    run: str
    action: RunAction
    reason: str
    def __init__(self, run: _Optional[str] = ..., action: _Optional[_Union[RunAction, str]] = ..., reason: _Optional[str] = ...) -> None: ...

class RunDescription(_message.Message):
    __slots__ = ("spec_json", "layout_json", "release_key")
    SPEC_JSON_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_JSON_FIELD_NUMBER: _ClassVar[int]
    RELEASE_KEY_FIELD_NUMBER: _ClassVar[int]
    spec_json: str
    layout_json: str
    release_key: str
    def __init__(self, spec_json: _Optional[str] = ..., layout_json: _Optional[str] = ..., release_key: _Optional[str] = ...) -> None: ...

class ListRunsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListRunsReply(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedCompositeFieldContainer[RunStatus]
    def __init__(self, runs: _Optional[_Iterable[_Union[RunStatus, _Mapping]]] = ...) -> None: ...

class RunStatus(_message.Message):
    __slots__ = ("status_json",)
    STATUS_JSON_FIELD_NUMBER: _ClassVar[int]
    status_json: str
    def __init__(self, status_json: _Optional[str] = ...) -> None: ...

class InviteRequest(_message.Message):
    __slots__ = ("owner", "quota", "lifetime_s", "administrator")
    OWNER_FIELD_NUMBER: _ClassVar[int]
    QUOTA_FIELD_NUMBER: _ClassVar[int]
    LIFETIME_S_FIELD_NUMBER: _ClassVar[int]
    ADMINISTRATOR_FIELD_NUMBER: _ClassVar[int]
    owner: str
    quota: int
    lifetime_s: float
    administrator: str
    def __init__(self, owner: _Optional[str] = ..., quota: _Optional[int] = ..., lifetime_s: _Optional[float] = ..., administrator: _Optional[str] = ...) -> None: ...

class InviteReply(_message.Message):
    __slots__ = ("invitation", "expires_at")
    INVITATION_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_FIELD_NUMBER: _ClassVar[int]
    invitation: str
    expires_at: float
    def __init__(self, invitation: _Optional[str] = ..., expires_at: _Optional[float] = ...) -> None: ...

class Device(_message.Message):
    __slots__ = ("name", "owner", "state", "enrolled_at", "certificate_ends_at", "alarm")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OWNER_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ENROLLED_AT_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_ENDS_AT_FIELD_NUMBER: _ClassVar[int]
    ALARM_FIELD_NUMBER: _ClassVar[int]
    name: str
    owner: str
    state: str
    enrolled_at: float
    certificate_ends_at: float
    alarm: str
    def __init__(self, name: _Optional[str] = ..., owner: _Optional[str] = ..., state: _Optional[str] = ..., enrolled_at: _Optional[float] = ..., certificate_ends_at: _Optional[float] = ..., alarm: _Optional[str] = ...) -> None: ...

class ListDevicesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListDevicesReply(_message.Message):
    __slots__ = ("devices",)
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    devices: _containers.RepeatedCompositeFieldContainer[Device]
    def __init__(self, devices: _Optional[_Iterable[_Union[Device, _Mapping]]] = ...) -> None: ...

class RevokeRequest(_message.Message):
    __slots__ = ("device",)
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    device: str
    def __init__(self, device: _Optional[str] = ...) -> None: ...

class ThawRequest(_message.Message):
    __slots__ = ("device",)
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    device: str
    def __init__(self, device: _Optional[str] = ...) -> None: ...

class Administrator(_message.Message):
    __slots__ = ("name", "state", "enrolled_at", "certificate_ends_at")
    NAME_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ENROLLED_AT_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_ENDS_AT_FIELD_NUMBER: _ClassVar[int]
    name: str
    state: str
    enrolled_at: float
    certificate_ends_at: float
    def __init__(self, name: _Optional[str] = ..., state: _Optional[str] = ..., enrolled_at: _Optional[float] = ..., certificate_ends_at: _Optional[float] = ...) -> None: ...

class ListAdministratorsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListAdministratorsReply(_message.Message):
    __slots__ = ("administrators",)
    ADMINISTRATORS_FIELD_NUMBER: _ClassVar[int]
    administrators: _containers.RepeatedCompositeFieldContainer[Administrator]
    def __init__(self, administrators: _Optional[_Iterable[_Union[Administrator, _Mapping]]] = ...) -> None: ...

class RevokeAdministratorRequest(_message.Message):
    __slots__ = ("name",)
    NAME_FIELD_NUMBER: _ClassVar[int]
    name: str
    def __init__(self, name: _Optional[str] = ...) -> None: ...

class AuthorityRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class AuthorityReply(_message.Message):
    __slots__ = ("certificate_pem",)
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    certificate_pem: str
    def __init__(self, certificate_pem: _Optional[str] = ...) -> None: ...

class EnrollRequest(_message.Message):
    __slots__ = ("token", "device", "request_pem")
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_PEM_FIELD_NUMBER: _ClassVar[int]
    token: bytes
    device: str
    request_pem: str
    def __init__(self, token: _Optional[bytes] = ..., device: _Optional[str] = ..., request_pem: _Optional[str] = ...) -> None: ...

class EnrollReply(_message.Message):
    __slots__ = ("certificate_pem", "release_key", "port")
    CERTIFICATE_PEM_FIELD_NUMBER: _ClassVar[int]
    RELEASE_KEY_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    certificate_pem: str
    release_key: str
    port: int
    def __init__(self, certificate_pem: _Optional[str] = ..., release_key: _Optional[str] = ..., port: _Optional[int] = ...) -> None: ...

class RenewRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
