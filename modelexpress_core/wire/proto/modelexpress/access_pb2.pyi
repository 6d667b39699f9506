from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class GetReadGrantRequest(_message.Message):
    __slots__ = ("mx_source_id", "worker_id")
    MX_SOURCE_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    mx_source_id: str
    worker_id: str
    def __init__(self, mx_source_id: _Optional[str] = ..., worker_id: _Optional[str] = ...) -> None: ...

class GetReadGrantResponse(_message.Message):
    __slots__ = ("grant", "valid_for_seconds")
    GRANT_FIELD_NUMBER: _ClassVar[int]
    VALID_FOR_SECONDS_FIELD_NUMBER: _ClassVar[int]
    grant: str
    valid_for_seconds: int
    def __init__(self, grant: _Optional[str] = ..., valid_for_seconds: _Optional[int] = ...) -> None: ...

class ReadGrant(_message.Message):
    __slots__ = ("reader", "mx_source_id", "worker_id", "expires_at_ms")
    READER_FIELD_NUMBER: _ClassVar[int]
    MX_SOURCE_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    EXPIRES_AT_MS_FIELD_NUMBER: _ClassVar[int]
    reader: str
    mx_source_id: str
    worker_id: str
    expires_at_ms: int
    def __init__(self, reader: _Optional[str] = ..., mx_source_id: _Optional[str] = ..., worker_id: _Optional[str] = ..., expires_at_ms: _Optional[int] = ...) -> None: ...

class RenewLeaseRequest(_message.Message):
    __slots__ = ("lease_id", "read_bytes")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    read_bytes: int
    def __init__(self, lease_id: _Optional[str] = ..., read_bytes: _Optional[int] = ...) -> None: ...

class RenewLeaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
