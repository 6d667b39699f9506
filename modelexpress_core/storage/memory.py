"""Objects in this process's memory: ``memory://name/path``, for tests, notebooks and checkpoints made on the fly."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping

from modelexpress_core.contracts.storage import ObjectInfo
from modelexpress_core.errors import NotFoundError, SourceChangedError
from modelexpress_core.messages import byte_range
from modelexpress_core.uri import ModelURI

__all__ = ["MemoryStorage", "open_memory", "store"]

_PROVIDER = "modelexpress-core"


class MemoryStorage:
    """A named set of objects. All loads of one process that use one name see the same objects."""

    def __init__(self, name: str = "") -> None:
        self._name = name
        self._lock = threading.Lock()
        self._objects: dict[str, tuple[int, memoryview]] = {}
        self._writes = 0

    def put(self, path: str, content: bytes | bytearray | memoryview) -> ObjectInfo:
        """Keep ``content`` at ``path`` (not a copy of it), as a new version."""
        view = memoryview(content).cast("B")
        with self._lock:
            self._writes += 1
            self._objects[path.strip("/")] = (self._writes, view)
            return ObjectInfo(path.strip("/"), len(view), str(self._writes))

    def delete(self, path: str) -> None:
        """Forget the object at ``path``, if there is one."""
        with self._lock:
            self._objects.pop(path.strip("/"), None)

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        """The objects below ``prefix``."""
        root = "/" if prefix.startswith("/") else ""  # memory:///path has no authority, and so an absolute path
        start = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        with self._lock:
            objects = sorted(self._objects.items())
        for path, (version, content) in objects:
            if path.startswith(start):
                yield ObjectInfo(root + path, len(content), str(version))

    def stat(self, path: str) -> ObjectInfo:
        """The object at ``path``."""
        version, content = self._get(path, "read the size")
        return ObjectInfo(path.strip("/"), len(content), str(version))

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        """Copy into ``buffer``."""
        operation = f"read {byte_range(offset, len(buffer))}"
        current, content = self._get(path, operation)
        if version is not None and str(current) != version:
            reason = "the object was replaced since the load began"
            raise SourceChangedError(
                reason,
                uri=self._uri(path),
                operation=operation,
                provider=_PROVIDER,
                hint="start the load again",
            )
        part = content[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        return len(part)

    def close(self) -> None:
        """Nothing to give up: the objects stay until they are deleted."""

    def _uri(self, path: str) -> str:
        return str(ModelURI("memory", self._name, path.strip("/")))

    def _get(self, path: str, operation: str) -> tuple[int, memoryview]:
        with self._lock:
            found = self._objects.get(path.strip("/"))
            known = len(self._objects)
        if found is None:
            reason = f"no such object among the {known} in memory://{self._name}"
            raise NotFoundError(
                reason,
                uri=self._uri(path),
                operation=operation,
                provider=_PROVIDER,
                hint="put it there with modelexpress_core.storage.memory.store(name).put(path, content)",
            )
        return found


_stores: dict[str, MemoryStorage] = {}
_stores_lock = threading.Lock()


def store(name: str) -> MemoryStorage:
    """The objects that ``memory://name`` stands for in this process; made at first use."""
    with _stores_lock:
        return _stores.setdefault(name, MemoryStorage(name))


def open_memory(uri: ModelURI, settings: Mapping[str, str]) -> MemoryStorage:  # noqa: ARG001 - the factory's signature
    """The storage for ``memory`` URIs."""
    return store(uri.authority)
