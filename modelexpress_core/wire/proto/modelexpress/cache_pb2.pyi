from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class OpenModelRequest(_message.Message):
    __slots__ = ("place", "revision", "version", "no_weights")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NO_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    place: str
    revision: str
    version: str
    no_weights: bool
    def __init__(self, place: _Optional[str] = ..., revision: _Optional[str] = ..., version: _Optional[str] = ..., no_weights: bool = ...) -> None: ...

class OpenModelResponse(_message.Message):
    __slots__ = ("place", "source", "version", "files", "next_page_token", "size_bytes", "present_bytes", "complete", "manifest_digest", "directory")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PRESENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    MANIFEST_DIGEST_FIELD_NUMBER: _ClassVar[int]
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    place: str
    source: str
    version: str
    files: _containers.RepeatedCompositeFieldContainer[CachedFile]
    next_page_token: str
    size_bytes: int
    present_bytes: int
    complete: bool
    manifest_digest: str
    directory: str
    def __init__(self, place: _Optional[str] = ..., source: _Optional[str] = ..., version: _Optional[str] = ..., files: _Optional[_Iterable[_Union[CachedFile, _Mapping]]] = ..., next_page_token: _Optional[str] = ..., size_bytes: _Optional[int] = ..., present_bytes: _Optional[int] = ..., complete: bool = ..., manifest_digest: _Optional[str] = ..., directory: _Optional[str] = ...) -> None: ...

class CachedFile(_message.Message):
    __slots__ = ("path", "size", "version", "digests")
    class DigestsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    PATH_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DIGESTS_FIELD_NUMBER: _ClassVar[int]
    path: str
    size: int
    version: str
    digests: _containers.ScalarMap[str, str]
    def __init__(self, path: _Optional[str] = ..., size: _Optional[int] = ..., version: _Optional[str] = ..., digests: _Optional[_Mapping[str, str]] = ...) -> None: ...

class ModelVersion(_message.Message):
    __slots__ = ("place", "version")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    place: str
    version: str
    def __init__(self, place: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class ListFilesRequest(_message.Message):
    __slots__ = ("model", "page_token")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersion
    page_token: str
    def __init__(self, model: _Optional[_Union[ModelVersion, _Mapping]] = ..., page_token: _Optional[str] = ...) -> None: ...

class ListFilesResponse(_message.Message):
    __slots__ = ("files", "next_page_token")
    FILES_FIELD_NUMBER: _ClassVar[int]
    NEXT_PAGE_TOKEN_FIELD_NUMBER: _ClassVar[int]
    files: _containers.RepeatedCompositeFieldContainer[CachedFile]
    next_page_token: str
    def __init__(self, files: _Optional[_Iterable[_Union[CachedFile, _Mapping]]] = ..., next_page_token: _Optional[str] = ...) -> None: ...

class ReadFileRequest(_message.Message):
    __slots__ = ("model", "path", "ranges", "checksums")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PATH_FIELD_NUMBER: _ClassVar[int]
    RANGES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUMS_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersion
    path: str
    ranges: _containers.RepeatedCompositeFieldContainer[FileRange]
    checksums: bool
    def __init__(self, model: _Optional[_Union[ModelVersion, _Mapping]] = ..., path: _Optional[str] = ..., ranges: _Optional[_Iterable[_Union[FileRange, _Mapping]]] = ..., checksums: bool = ...) -> None: ...

class FileRange(_message.Message):
    __slots__ = ("offset", "length", "stride", "count")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    offset: int
    length: int
    stride: int
    count: int
    def __init__(self, offset: _Optional[int] = ..., length: _Optional[int] = ..., stride: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class OpenBulkRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersion
    def __init__(self, model: _Optional[_Union[ModelVersion, _Mapping]] = ...) -> None: ...

class OpenBulkResponse(_message.Message):
    __slots__ = ("port", "ticket", "content", "version", "valid_for_seconds", "host")
    PORT_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    VALID_FOR_SECONDS_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    port: int
    ticket: str
    content: str
    version: str
    valid_for_seconds: int
    host: str
    def __init__(self, port: _Optional[int] = ..., ticket: _Optional[str] = ..., content: _Optional[str] = ..., version: _Optional[str] = ..., valid_for_seconds: _Optional[int] = ..., host: _Optional[str] = ...) -> None: ...

class ReadManifestRequest(_message.Message):
    __slots__ = ("model", "table", "offset", "length")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    TABLE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersion
    table: str
    offset: int
    length: int
    def __init__(self, model: _Optional[_Union[ModelVersion, _Mapping]] = ..., table: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ...) -> None: ...

class ReadManifestResponse(_message.Message):
    __slots__ = ("data",)
    DATA_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    def __init__(self, data: _Optional[bytes] = ...) -> None: ...

class ComparePartsRequest(_message.Message):
    __slots__ = ("model", "parts")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersion
    parts: _containers.RepeatedCompositeFieldContainer[FilePart]
    def __init__(self, model: _Optional[_Union[ModelVersion, _Mapping]] = ..., parts: _Optional[_Iterable[_Union[FilePart, _Mapping]]] = ...) -> None: ...

class FilePart(_message.Message):
    __slots__ = ("path", "offset", "length", "crc64nvme", "stride", "count")
    PATH_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    CRC64NVME_FIELD_NUMBER: _ClassVar[int]
    STRIDE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    path: str
    offset: int
    length: int
    crc64nvme: int
    stride: int
    count: int
    def __init__(self, path: _Optional[str] = ..., offset: _Optional[int] = ..., length: _Optional[int] = ..., crc64nvme: _Optional[int] = ..., stride: _Optional[int] = ..., count: _Optional[int] = ...) -> None: ...

class ComparePartsResponse(_message.Message):
    __slots__ = ("different", "damaged")
    DIFFERENT_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    different: _containers.RepeatedScalarFieldContainer[int]
    damaged: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, different: _Optional[_Iterable[int]] = ..., damaged: _Optional[_Iterable[int]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[CachedModel]
    def __init__(self, models: _Optional[_Iterable[_Union[CachedModel, _Mapping]]] = ...) -> None: ...

class CachedModel(_message.Message):
    __slots__ = ("place", "source", "version", "revision", "files", "size_bytes", "present_bytes", "complete", "weights", "idle_seconds", "in_use", "error")
    PLACE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    FILES_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    PRESENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    IN_USE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    place: str
    source: str
    version: str
    revision: str
    files: int
    size_bytes: int
    present_bytes: int
    complete: bool
    weights: bool
    idle_seconds: float
    in_use: bool
    error: str
    def __init__(self, place: _Optional[str] = ..., source: _Optional[str] = ..., version: _Optional[str] = ..., revision: _Optional[str] = ..., files: _Optional[int] = ..., size_bytes: _Optional[int] = ..., present_bytes: _Optional[int] = ..., complete: bool = ..., weights: bool = ..., idle_seconds: _Optional[float] = ..., in_use: bool = ..., error: _Optional[str] = ...) -> None: ...

class ValidateModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersion
    def __init__(self, model: _Optional[_Union[ModelVersion, _Mapping]] = ...) -> None: ...

class ValidateModelResponse(_message.Message):
    __slots__ = ("compared_bytes", "size_bytes", "damaged", "done")
    COMPARED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    DAMAGED_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    compared_bytes: int
    size_bytes: int
    damaged: _containers.RepeatedCompositeFieldContainer[DamagedFile]
    done: bool
    def __init__(self, compared_bytes: _Optional[int] = ..., size_bytes: _Optional[int] = ..., damaged: _Optional[_Iterable[_Union[DamagedFile, _Mapping]]] = ..., done: bool = ...) -> None: ...

class DamagedFile(_message.Message):
    __slots__ = ("path", "reason")
    PATH_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    path: str
    reason: str
    def __init__(self, path: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class RemoveModelRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersion
    def __init__(self, model: _Optional[_Union[ModelVersion, _Mapping]] = ...) -> None: ...

class RemoveModelResponse(_message.Message):
    __slots__ = ("removed", "freed_bytes")
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    removed: int
    freed_bytes: int
    def __init__(self, removed: _Optional[int] = ..., freed_bytes: _Optional[int] = ...) -> None: ...

class GetCacheStatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCacheStatsResponse(_message.Message):
    __slots__ = ("directory", "models", "size_bytes", "limit_bytes", "free_bytes", "hits", "misses", "origin_bytes", "sent_bytes", "evictions", "downloads")
    DIRECTORY_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    MISSES_FIELD_NUMBER: _ClassVar[int]
    ORIGIN_BYTES_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    DOWNLOADS_FIELD_NUMBER: _ClassVar[int]
    directory: str
    models: int
    size_bytes: int
    limit_bytes: int
    free_bytes: int
    hits: int
    misses: int
    origin_bytes: int
    sent_bytes: int
    evictions: int
    downloads: int
    def __init__(self, directory: _Optional[str] = ..., models: _Optional[int] = ..., size_bytes: _Optional[int] = ..., limit_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., hits: _Optional[int] = ..., misses: _Optional[int] = ..., origin_bytes: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., evictions: _Optional[int] = ..., downloads: _Optional[int] = ...) -> None: ...
