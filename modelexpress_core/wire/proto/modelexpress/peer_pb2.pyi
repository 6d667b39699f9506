from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeTensorsRequest(_message.Message):
    __slots__ = ("mx_source_id", "worker_id", "first")
    MX_SOURCE_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_FIELD_NUMBER: _ClassVar[int]
    mx_source_id: str
    worker_id: str
    first: int
    def __init__(self, mx_source_id: _Optional[str] = ..., worker_id: _Optional[str] = ..., first: _Optional[int] = ...) -> None: ...

class DescribeTensorsResponse(_message.Message):
    __slots__ = ("total", "tensors")
    TOTAL_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    total: int
    tensors: _containers.RepeatedCompositeFieldContainer[TensorDescription]
    def __init__(self, total: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[TensorDescription, _Mapping]]] = ...) -> None: ...

class TensorDescription(_message.Message):
    __slots__ = ("name", "shape", "stride", "dtype", "same_memory_as", "digests")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SAME_MEMORY_AS_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    name: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    stride: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    same_memory_as: str
    digests: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, name: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., stride: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., same_memory_as: _Optional[str] = ..., digests: _Optional[_Iterable[int]] = ...) -> None: ...

class GetAccessRequest(_message.Message):
    __slots__ = ("lease_id", "transport")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    transport: str
    def __init__(self, lease_id: _Optional[str] = ..., transport: _Optional[str] = ...) -> None: ...

class GetAccessResponse(_message.Message):
    __slots__ = ("description",)
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    description: bytes
    def __init__(self, description: _Optional[bytes] = ...) -> None: ...

class ListReadersRequest(_message.Message):
    __slots__ = ("mx_source_id", "worker_id")
    MX_SOURCE_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    mx_source_id: str
    worker_id: str
    def __init__(self, mx_source_id: _Optional[str] = ..., worker_id: _Optional[str] = ...) -> None: ...

class ListReadersResponse(_message.Message):
    __slots__ = ("readers", "left_out")
    READERS_FIELD_NUMBER: _ClassVar[int]
    LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    readers: _containers.RepeatedCompositeFieldContainer[Reader]
    left_out: int
    def __init__(self, readers: _Optional[_Iterable[_Union[Reader, _Mapping]]] = ..., left_out: _Optional[int] = ...) -> None: ...

class Reader(_message.Message):
    __slots__ = ("name", "transport", "read_bytes", "counted", "seconds", "ended_seconds")
    NAME_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_FIELD_NUMBER: _ClassVar[int]
    COUNTED_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    ENDED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    transport: str
    read_bytes: int
    counted: bool
    seconds: float
    ended_seconds: float
    def __init__(self, name: _Optional[str] = ..., transport: _Optional[str] = ..., read_bytes: _Optional[int] = ..., counted: bool = ..., seconds: _Optional[float] = ..., ended_seconds: _Optional[float] = ...) -> None: ...

class ReadTensorsRequest(_message.Message):
    __slots__ = ("lease_id", "ranges", "checksums")
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    ranges: _containers.RepeatedCompositeFieldContainer[TensorRange]
    checksums: bool
    def __init__(self, lease_id: _Optional[str] = ..., ranges: _Optional[_Iterable[_Union[TensorRange, _Mapping]]] = ..., checksums: bool = ...) -> None: ...

class TensorRange(_message.Message):
    __slots__ = ("name", "offset", "length")
    NAME_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    name: str
    offset: int
    length: int
    def __init__(self, name: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class OpenBulkRequest(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: str
    def __init__(self, lease_id: _Optional[str] = ...) -> None: ...

class OpenBulkResponse(_message.Message):
    __slots__ = ("port", "ticket", "content", "version")
    PORT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    port: int
    ticket: str
    content: str
    version: str
    def __init__(self, port: _Optional[int] = ..., ticket: _Optional[str] = ..., content: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...
