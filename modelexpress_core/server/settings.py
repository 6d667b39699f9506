"""Settings of the server, set by flag, variable or file."""

from __future__ import annotations

import re

from attrs import frozen

from modelexpress_core.errors import SettingsError
from modelexpress_core.messages import without_credentials
from modelexpress_core.settings import (
    Override,
    boolean,
    byte_count,
    env,
    names,
    one_of,
    positive_integer,
    seconds,
    tcp_port,
)
from modelexpress_core.uri import host_and_port, redacted

__all__ = [
    "CacheSettings",
    "ConfigPath",
    "LimitSettings",
    "LogSettings",
    "SecurityVariables",
    "ServerSettings",
    "SpanSettings",
    "StoreVariables",
    "directory_path",
    "has_stray_password",
]

_LEVELS = ("debug", "info", "warning", "error")

#: Names of levels in existing deployments.
_OTHER_LEVELS = {"trace": "debug", "warn": "warning"}

_FORMATS = ("text", "json")


_known_level = one_of(_LEVELS)


def _level(text: str) -> str:
    word = text.strip().lower()
    return _known_level(_OTHER_LEVELS.get(word, word))


def has_stray_password(uri: str) -> bool:
    """Whether ``uri`` has an at sign after its authority, as with a password that has a slash which is not encoded.

    The text before it would be taken for host and path, and shown.
    """
    return re.search(r"[/?#].*@", uri.partition("://")[2], re.DOTALL) is not None


def _redacted(uri: str) -> str:
    return "***" if has_stray_password(uri) else redacted(uri)


@frozen
class ConfigPath:
    """The configuration file of the server."""

    path: str | None = env(
        "MX_SERVER_CONFIG", default=None, help="YAML file with settings of the server; variables and flags win over it."
    )


@frozen
class ServerSettings:
    """How the server runs."""

    host: str = env(
        "MODEL_EXPRESS_SERVER_HOST",
        default="127.0.0.1",
        help="Address that the server listens on; 0.0.0.0 or [::] for all, where workers on other hosts call it.",
    )
    port: int = env(
        "MODEL_EXPRESS_SERVER_PORT",
        default=8001,
        converter=tcp_port,
        help="Port of all gRPC services; 0: any free one.",
    )
    metrics_port: int = env(
        "MODEL_EXPRESS_SERVER_METRICS_PORT",
        default=9401,
        converter=tcp_port,
        help="Port of the Prometheus metrics; 0: any free one.",
    )
    metrics_token: str | None = env(
        "MX_METRICS_TOKEN_PATH",
        default=None,
        help="File with the bearer token that callers of the metrics need; unset: every caller is answered.",
    )
    health_port: int | None = env(
        "MODEL_EXPRESS_HEALTH_PORT",
        default=None,
        converter=tcp_port,
        help="Port that serves health alone, without TLS, for probes without TLS; unset: no such port.",
    )
    metadata: str = env(
        "MX_METADATA_URI",
        default="memory://",
        shown=_redacted,
        help="Where metadata is kept: memory:// (one server, lost with it), redis://, rediss://, or a plugin's.",
    )
    heartbeat_timeout_seconds: float = env(
        "MX_HEARTBEAT_TIMEOUT_SECS",
        default=90.0,
        converter=seconds,
        help="A source becomes stale after this time without a heartbeat.",
    )
    removal_seconds: float = env(
        "MX_GC_TIMEOUT_SECS",
        default=3600.0,
        converter=seconds,
        help="A stale source is removed after this time without a heartbeat.",
    )
    reaper_interval_seconds: float = env(
        "MX_REAPER_SCAN_INTERVAL_SECS",
        default=30.0,
        converter=seconds,
        help="How often the server looks for silent sources.",
    )
    drain_seconds: float = env(
        "MX_DRAIN_SECONDS",
        default=10.0,
        converter=seconds,
        help="How long calls in flight may take after SIGTERM.",
    )


def _message_bytes(text: str) -> int:
    count = byte_count(text)
    if not 64 << 10 <= count <= 100 << 20:
        reason = "expected 64KiB to 100MiB"
        raise ValueError(reason)
    return count


@frozen
class LimitSettings:
    """How much callers may make the server hold.

    The defaults hold 10,000 workers with records of 100 KiB, which is about 700 tensors in both lists of the protocol.
    """

    caller_bytes: int = env(
        "MX_MAX_CALLER_BYTES",
        default=1 << 30,
        converter=byte_count,
        help="Bytes of all records of one caller: its authenticated name, or else its address.",
    )
    records_bytes: int = env(
        "MX_MAX_RECORDS_BYTES",
        default=2 << 30,
        converter=byte_count,
        help="Bytes of the records of all callers.",
    )
    string_bytes: int = env(
        "MX_MAX_STRING_BYTES",
        default=8 << 10,
        converter=byte_count,
        help="Bytes of each name, id and other text of a record, besides names of tensors.",
    )
    entries: int = env(
        "MX_MAX_ENTRIES",
        default=64,
        converter=positive_integer,
        help="Entries of the topology of a record, and of the extra parameters of its identity.",
    )
    topology_bytes: int = env(
        "MX_MAX_TOPOLOGY_BYTES",
        default=16 << 10,
        converter=byte_count,
        help="Bytes of all keys and values of the topology of a record. Lists contain the topology.",
    )
    message_bytes: int = env(
        "MX_MAX_MESSAGE_BYTES",
        default=16 << 20,
        converter=_message_bytes,
        help="Longest message that the server receives, up to 100MiB, the longest of the protocol.",
    )
    receiving_bytes: int = env(
        "MX_MAX_RECEIVING_BYTES",
        default=512 << 20,
        converter=byte_count,
        help="Bytes of all messages that are still arriving; the longest message is assumed for each.",
    )
    answer_bytes: int = env(
        "MX_MAX_ANSWER_BYTES",
        default=512 << 20,
        converter=byte_count,
        help="Memory of all answers that callers have not read yet; an address may use half, a connection a quarter.",
    )


@frozen
class LogSettings:
    """What the server logs."""

    level: str = env(
        "MODEL_EXPRESS_LOG_LEVEL",
        default="info",
        converter=_level,
        help="Lowest level that the server logs: debug (every call), info, warning or error.",
    )
    format: str = env(
        "MX_LOG_FORMAT",
        default="text",
        converter=one_of(_FORMATS),
        help="Format of the log: text for people, or json, an object on each line.",
    )


@frozen
class SpanSettings:
    """Where the server exports spans to.

    They are variables of OpenTelemetry, whose SDK reads them, too; these decide whether the server exports at all.
    """

    exporters: tuple[str, ...] = env(
        "OTEL_TRACES_EXPORTER",
        default=(),
        converter=names,
        help="Where spans of the server go: otlp, console or none; unset: otlp where an endpoint is set.",
    )
    endpoint: str | None = env(
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        default=None,
        shown=_redacted,
        help="The collector that spans of the server go to.",
    )
    protocol: str = env(
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
        "OTEL_EXPORTER_OTLP_PROTOCOL",
        default="grpc",
        help="Protocol of the collector: grpc or http/protobuf.",
    )


@frozen
class StoreVariables:
    """Variables that existing deployments set in place of a URI for the metadata."""

    backend: str | None = env(
        "MX_METADATA_BACKEND",
        default=None,
        shown=without_credentials,
        help="Where the server keeps metadata if no URI says so: memory, redis or kubernetes.",
    )
    redis_url: str | None = env("REDIS_URL", default=None, shown=_redacted, help="URL of Redis, for the backend redis.")
    redis_host: str = env(
        "MX_REDIS_HOST",
        default="localhost",
        shown=without_credentials,
        help="Host of Redis, for the backend redis without a URL.",
    )
    redis_port: int = env(
        "MX_REDIS_PORT",
        default=6379,
        converter=tcp_port,
        help="Port of Redis, for the backend redis without a URL.",
    )

    def metadata(self) -> Override | None:
        """The URI that they stand for, and their names; None if none is set.

        Raises:
            SettingsError: No backend has that name.
        """
        if self.backend is None:
            return None
        backend = self.backend.strip().lower()
        uris = {
            "memory": "memory://",
            "redis": self.redis_url or f"redis://{host_and_port(self.redis_host, self.redis_port)}",
            "kubernetes": "kubernetes://",
        }
        if backend not in uris:
            asked = without_credentials(self.backend)
            message = f"no metadata backend of a server is called {asked!r}; there are {', '.join(uris)}"
            raise SettingsError(message, hint="correct MX_METADATA_BACKEND, or set MX_METADATA_URI, which wins over it")
        from_url = backend == "redis" and self.redis_url
        return Override(uris[backend], f"MX_METADATA_BACKEND{', REDIS_URL' if from_url else ''}")


@frozen
class SecurityVariables:
    """The variable that existing deployments set in place of a mode of authentication."""

    mode: str | None = env(
        "MODEL_EXPRESS_SECURITY_MODE",
        default=None,
        converter=one_of(("off", "enforce")),
        help="How a server authenticates callers if MX_AUTH_MODE does not say so: off, or enforce for kubernetes.",
    )

    def auth_mode(self) -> Override | None:
        """The mode of ``AuthSettings`` that it stands for; None if it is not set, or off."""
        return Override("kubernetes", "MODEL_EXPRESS_SECURITY_MODE") if self.mode == "enforce" else None


#: Begins a URL, perhaps with a slash that is missing.
_BEGINS_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")


def directory_path(text: str) -> str:
    """``text``, which is the path of a directory.

    Raises:
        ValueError: It is a URL; it may hold credentials, which the name of a directory would show.
    """
    if _BEGINS_URL.match(text):
        reason = "expected the path of a directory, not a URL"
        raise ValueError(reason)
    return text


@frozen
class CacheSettings:
    """Where the server keeps models, which ones, and how many."""

    directory: str | None = env(
        "MODEL_EXPRESS_CACHE_DIRECTORY",
        default=None,
        converter=directory_path,
        help="Directory in which the server keeps models; unset: it keeps none.",
    )
    endpoint: str | None = env(
        "MX_CACHE_ENDPOINT",
        default=None,
        help="Address (host:port) by which the other replicas of this server reach it, which share a metadata store: "
        "one of them downloads a model, and the others read it from there. Unset: each downloads it.",
    )
    sources: tuple[str, ...] = env(
        "MX_CACHE_SOURCES",
        default=("hf",),
        converter=names,
        help="Where callers may have the server download from: schemes, and beginnings of URIs that may hold * and ? "
        "(hf,s3://models-*,file:///data/models). What MX_MODEL_URI names is allowed too.",
    )
    max_bytes: int | None = env(
        "MX_CACHE_MAX_BYTES",
        default=None,
        converter=byte_count,
        help="Bytes of all models; those that were read least recently are removed. Unset: what the disk holds.",
    )
    min_free_bytes: int = env(
        "MX_CACHE_MIN_FREE_BYTES",
        default=1 << 30,
        converter=byte_count,
        help="Free bytes of the disk that models leave.",
    )
    max_caller_bytes: int | None = env(
        "MX_CACHE_MAX_CALLER_BYTES",
        default=None,
        converter=byte_count,
        help="Bytes of the models that one caller (its authenticated name, or else its address) may have the server "
        "download; what was removed does not count. Unset: no limit of its own.",
    )
    max_idle_seconds: float | None = env(
        "MX_CACHE_MAX_IDLE_SECONDS",
        default=None,
        converter=seconds,
        help="A model that nobody has read for so long is removed; unset: none for its age.",
    )
    bulk_port: int = env(
        "MX_SERVER_BULK_PORT",
        default=8002,
        converter=tcp_port,
        help="Port on which the server sends models as raw bytes; any free port if it is in use. 0: no such port, "
        "everything goes over gRPC.",
    )
    bulk_plaintext: bool = env(
        "MX_BULK_PLAINTEXT",
        default=False,
        converter=boolean,
        help="Send raw bytes without TLS to other hosts, though MX_AUTH_MODE authenticates callers: others on the "
        "network can then read tickets and weights. By default they go to this host alone then.",
    )
    may_delete: bool = env(
        "MX_CACHE_DELETE",
        default=False,
        converter=boolean,
        help="Whether callers of the server may remove models.",
    )
