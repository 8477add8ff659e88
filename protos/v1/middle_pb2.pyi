from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class MiddleRequest(_message.Message):
    __slots__ = ("base",)
    BASE_FIELD_NUMBER: _ClassVar[int]
    base: str
    def __init__(self, base: _Optional[str] = ...) -> None: ...

class MiddleLayers(_message.Message):
    __slots__ = ("base", "first", "last")
    BASE_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    base: str
    first: int
    last: int
    def __init__(self, base: _Optional[str] = ..., first: _Optional[int] = ..., last: _Optional[int] = ...) -> None: ...

class Hidden(_message.Message):
    __slots__ = ("base", "batch", "length", "width", "scale", "values", "exact")
    BASE_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    EXACT_FIELD_NUMBER: _ClassVar[int]
    base: str
    batch: int
    length: int
    width: int
    scale: float
    values: bytes
    exact: bool
    def __init__(self, base: _Optional[str] = ..., batch: _Optional[int] = ..., length: _Optional[int] = ..., width: _Optional[int] = ..., scale: _Optional[float] = ..., values: _Optional[bytes] = ..., exact: _Optional[bool] = ...) -> None: ...

class HiddenGradient(_message.Message):
    __slots__ = ("entered", "by_left")
    ENTERED_FIELD_NUMBER: _ClassVar[int]
    BY_LEFT_FIELD_NUMBER: _ClassVar[int]
    entered: Hidden
    by_left: Hidden
    def __init__(self, entered: _Optional[_Union[Hidden, _Mapping]] = ..., by_left: _Optional[_Union[Hidden, _Mapping]] = ...) -> None: ...
