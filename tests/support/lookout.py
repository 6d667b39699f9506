"""A storage plugin that says where it connects and as whom; its files are those of this machine."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping

from attrs import frozen

from modelexpress_core.contracts.storage import Endpoint, ObjectInfo
from modelexpress_core.errors import AccessDeniedError, BackendError
from modelexpress_core.hooks import hookimpl
from modelexpress_core.providers import StorageCapabilities, StorageProvider
from modelexpress_core.settings import boolean, env, from_env, names, positive_integer
from modelexpress_core.storage.file import FileStorage
from modelexpress_core.uri import ModelURI


@frozen
class LookoutSettings:
    """Where the lookout says it connects, as whom, and what it is not allowed to do."""

    host: str = env("LOOKOUT_HOST", default="127.0.0.1", help="Host.")
    port: int = env("LOOKOUT_PORT", default=9, converter=positive_integer, help="Port.")
    tls: bool = env("LOOKOUT_TLS", default=False, converter=boolean, help="Encrypted?")
    ca_bundle: str | None = env("LOOKOUT_CA", default=None, help="Authorities.")
    proxy: str | None = env("LOOKOUT_PROXY", default=None, help="Proxy.")
    key: str = env("LOOKOUT_KEY", default="", secret=True, help="Key.")
    denied: tuple[str, ...] = env("LOOKOUT_DENIED", default=(), converter=names, help="list, read, credentials")
    silent: tuple[str, ...] = env("LOOKOUT_SILENT", default=(), converter=names, help="list, close")
    broken: tuple[str, ...] = env("LOOKOUT_BROKEN", default=(), converter=names, help="endpoint, credentials, list")


class Lookout(FileStorage):
    """A directory, behind an endpoint."""

    def __init__(self, settings: LookoutSettings) -> None:
        super().__init__()
        self._settings = settings

    def endpoint(self) -> Endpoint:
        self._obey("endpoint")
        settings = self._settings
        return Endpoint(settings.host, settings.port, settings.tls, settings.ca_bundle, settings.proxy)

    def credentials(self) -> str:
        self._obey("credentials")
        return f"key ...{self._settings.key[-2:]}, from LOOKOUT_KEY"

    def list(self, prefix: str) -> Iterator[ObjectInfo]:
        self._obey("list")
        return super().list(prefix)

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        self._obey("read")
        return super().read_into(path, offset, buffer, version=version)

    def close(self) -> None:
        self._obey("close")
        super().close()

    def _obey(self, operation: str) -> None:
        if operation in self._settings.denied:
            raise AccessDeniedError("not allowed", operation=operation, cause="a rule", hint="ask the owner")
        if operation in self._settings.broken:
            message = f"a fault in {operation}"
            raise RuntimeError(message)
        if operation in self._settings.silent:
            time.sleep(3)
            raise BackendError("woke up too late", operation=operation)


def open_lookout(uri: ModelURI, settings: Mapping[str, str]) -> Lookout:
    return Lookout(from_env(LookoutSettings, settings))


@hookimpl
def mx_register_storages() -> list[StorageProvider]:
    return [
        StorageProvider(
            "mx-lookout",
            ("lookout",),
            open_lookout,
            capabilities=StorageCapabilities(diagnosis=True),
            settings=LookoutSettings,
        )
    ]
