"""The steps of a diagnosis, in order: what each examines, and which of them are skipped after a failure."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from itertools import islice
from typing import Any, TypeVar, cast

from modelexpress_core.checkpoint import Checkpoint
from modelexpress_core.checkpoint.index import INDEX_SUFFIX, SUFFIX
from modelexpress_core.contracts.storage import DiagnosableStorage, ObjectInfo, PatientStorage, Storage
from modelexpress_core.doctor.network import NetworkRoute, call_with_deadline
from modelexpress_core.doctor.step import Step
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    IntegrityError,
    ModelExpressError,
    NotFoundError,
    SettingsError,
    UnsupportedError,
)
from modelexpress_core.fetch import RetryBudget, RetryingStorage, RetryPolicy
from modelexpress_core.loader import Loader
from modelexpress_core.loads.context import redacted_uris
from modelexpress_core.messages import byte_range, listed, printable
from modelexpress_core.plugins import CORE, STORAGE, PluginManager
from modelexpress_core.probing import ProbeError
from modelexpress_core.providers import StorageProvider
from modelexpress_core.registry import Registered
from modelexpress_core.report import format_bytes, format_files
from modelexpress_core.settings import CORE_SETTINGS, SettingValue, describe
from modelexpress_core.tls_errors import UNTRUSTED_HINT
from modelexpress_core.uri import ModelURI, host_and_port

__all__ = ["diagnose"]

_T = TypeVar("_T")

#: Deadline of a request to the storage, in time-outs of one wait on the network: a request has several.
_STORAGE_FACTOR = 4

#: Deadline of reading all headers, retries included, likewise.
_CHECKPOINT_FACTOR = 12

#: Objects of a listing that are examined at most.
_MAX_OBJECTS = 10_000

#: Bytes of each test read.
_READ_BYTES = 64 << 10

#: A larger difference of clocks is noted: servers refuse signatures if it is some minutes.
_MAX_SKEW_SECONDS = 30

#: A certificate that expires sooner is noted.
_SOON_DAYS = 14


class _SkippedError(Exception):
    """A step is skipped; the text says why."""


def diagnose(
    uri: str | os.PathLike[str] | ModelURI,
    *,
    environ: Mapping[str, str] | None = None,
    plugins: PluginManager | None = None,
    timeout_seconds: float = 5.0,
) -> Iterator[Step]:
    """Examine everything that a load of ``uri`` needs, and yield the result of each step as soon as it is known.

    Reads settings, looks names up, connects, lists, reads 64 KiB at the start and in the middle of a file, and all
    headers. Writes nothing. It raises no error: failures are in the steps. ``can_load`` sums them up.

    Args:
        uri: A directory, an index, or one safetensors file, as a URI or a path.
        environ: Variables to read settings from; by default the process's.
        plugins: Plugins to use; by default all that are installed and allowed.
        timeout_seconds: How long one wait on the network may take; a request to the storage may take four times as
            long, all headers twelve times.

    Yields:
        One ``Step`` for each name in ``STEPS``.
    """
    examination = _Examination(uri, environ, plugins, timeout_seconds)
    with contextlib.closing(examination):
        yield from examination.steps()


class _Examination:
    """The results of the steps so far."""

    def __init__(
        self,
        uri: str | os.PathLike[str] | ModelURI,
        environ: Mapping[str, str] | None,
        plugins: PluginManager | None,
        timeout_seconds: float,
    ) -> None:
        self._asked = uri
        self._given_environ = environ
        self._environ = os.environ if environ is None else environ
        self._plugins = plugins
        self._timeout = timeout_seconds
        self._usable_settings = False
        self._parsed: ModelURI | None = None
        self._loader: Loader | None = None
        self._uri: ModelURI | None = None
        self._registered: Registered[StorageProvider] | None = None
        self._storage: Storage | None = None
        self._route: NetworkRoute | None = None
        self._addresses: tuple[str, ...] = ()
        self._connected = ""
        self._secure = False
        self._unreachable = False
        self._object: ObjectInfo | None = None
        self._checkpoint: Checkpoint | None = None

    def steps(self) -> Iterator[Step]:
        """Take the steps one by one."""
        yield self._take("settings", self._read_settings)
        yield self._take("uri", self._parse)
        yield self._take("plugin", self._open_plugin)
        yield self._take("name", self._look_up)
        yield self._take("connection", self._connect)
        yield self._take("tls", self._encrypt)
        yield self._take("clock", self._compare_clocks)
        yield self._take("credentials", self._get_credentials)
        yield self._take("listing", self._list)
        yield self._take("read", self._read)
        yield self._take("checkpoint", self._open_headers)

    def close(self) -> None:
        """Close the storage, and wait for it no longer than the time-out."""
        if self._storage is not None:
            with contextlib.suppress(Exception):
                call_with_deadline(self._timeout, self._storage.close, "close the storage")

    def _take(self, name: str, look: Callable[[dict[str, Any]], tuple[str, str]]) -> Step:
        """Take one step: ``look`` fills in facts, and returns a status and what it has seen."""
        facts: dict[str, Any] = {}
        begun = time.monotonic()
        cause = hint = None
        error = ""
        try:
            status, seen = look(facts)
        except _SkippedError as exc:
            status, seen = "skipped", str(exc)
        except ModelExpressError as exc:
            status, seen = "failed", exc.headline
            cause, hint, error = exc.cause, exc.hint, type(exc).__name__
        except Exception as exc:  # noqa: BLE001 - a plugin's
            status, seen = "failed", f"the storage plugin did not translate {type(exc).__name__}: {exc}"
            hint, error = "report it to the plugin's authors", type(exc).__name__
        milliseconds = 0.0 if status == "skipped" else round((time.monotonic() - begun) * 1000, 3)
        return Step(name, status, seen, milliseconds, facts, cause, hint, error)

    # -- what needs no network ----------------------------------------------------------------------------------------

    def _read_settings(self, facts: dict[str, Any]) -> tuple[str, str]:
        rows = [row for cls in CORE_SETTINGS for row in describe(cls, self._environ, owner=CORE)]
        chosen = _set(rows)
        facts["variables"] = chosen
        problems = [row.problem for row in rows if row.problem]
        if problems:
            message = "settings that cannot be used: " + "; ".join(problems)
            raise SettingsError(message, hint="correct or unset them; `mx settings` shows all that are read")
        self._usable_settings = True
        return "ok", f"{', '.join(chosen)} {'is' if len(chosen) == 1 else 'are'} set" if chosen else "all defaults"

    def _parse(self, facts: dict[str, Any]) -> tuple[str, str]:
        self._parsed = uri = ModelURI.parse(self._asked)
        facts.update(uri=str(uri), scheme=uri.scheme)
        return "ok", str(uri)

    def _open_plugin(self, facts: dict[str, Any]) -> tuple[str, str]:
        if not self._usable_settings:
            reason = "the settings cannot be used"
            raise _SkippedError(reason)
        if self._parsed is None:
            reason = "there is no URI to look up"
            raise _SkippedError(reason)
        self._loader = loader = Loader(self._given_environ, self._plugins)
        candidates = loader.candidates(loader.request(self._parsed))
        self._uri = uri = candidates[0].uri
        facts.update(uri=str(uri), candidates=[str(candidate.uri) for candidate in candidates])
        registered = loader.plugins.table(STORAGE).lookup(uri.scheme)
        plugin = registered.plugin
        chosen = _set(self._plugin_settings(registered))
        facts.update(plugin=plugin.name, version=plugin.version, variables=chosen)
        registered, storage = loader.plugins.open(STORAGE, uri, self._environ)
        self._registered, self._storage = registered, storage
        if registered.provider.capabilities.patience:
            cast("PatientStorage", storage).patience_seconds = self._timeout
        seen = f"{plugin.name} {plugin.version}".strip() + f" handles {uri.scheme}"
        if chosen:
            seen += f"; {', '.join(chosen)} {'is' if len(chosen) == 1 else 'are'} set"
        if uri != self._parsed:
            seen += f"; a plugin replaced the URI by {uri}"
        if len(candidates) > 1:
            seen += f"; {len(candidates)} places would be tried, and this looks at the first, {uri}"
        return "ok", seen

    def _plugin_settings(self, registered: Registered[StorageProvider]) -> list[SettingValue]:
        declared = registered.provider.settings or ()
        classes = declared if isinstance(declared, tuple) else (declared,)
        return [value for cls in classes for value in describe(cls, self._environ, owner=registered.plugin.name)]

    def _opened(self) -> tuple[Registered[StorageProvider], Storage]:
        if self._registered is None or self._storage is None:
            reason = "no storage is open"
            raise _SkippedError(reason)
        return self._registered, self._storage

    def _diagnosable(self) -> DiagnosableStorage:
        registered, storage = self._opened()
        if registered.plugin.name == CORE:
            reason = f"{registered.provider.name} is on this machine"
            raise _SkippedError(reason)
        if not registered.provider.capabilities.diagnosis:
            reason = f"{registered.label} does not say where it connects, and with which credentials"
            raise _SkippedError(reason)
        return cast("DiagnosableStorage", storage)

    # -- the network --------------------------------------------------------------------------------------------------

    def _look_up(self, facts: dict[str, Any]) -> tuple[str, str]:
        endpoint = self._diagnosable().endpoint()
        self._route = route = NetworkRoute(endpoint, self._timeout)
        facts.update(host=endpoint.host, port=endpoint.port, proxy=self._proxy(route))
        through = f"{endpoint.host} is left to the proxy {facts['proxy']}; " if facts["proxy"] else ""
        if route.is_address:
            self._addresses = (route.host,)
            raise _SkippedError(f"{through}{route.host} is an address")
        with self._hinting_at_variable(endpoint):
            self._addresses = route.addresses()
        facts["addresses"] = list(self._addresses)
        return "ok", f"{through}{route.host} is {', '.join(self._addresses)}"

    @staticmethod
    def _proxy(route: NetworkRoute) -> str | None:
        return None if route.endpoint.proxy is None else host_and_port(route.host, route.port)

    def _connect(self, facts: dict[str, Any]) -> tuple[str, str]:
        route = self._usable_route()
        outcomes = route.connect(self._addresses)
        facts["port"] = route.port
        facts["milliseconds"] = {
            address: round(outcome, 3) for address, outcome in outcomes.items() if not isinstance(outcome, ProbeError)
        }
        facts["errors"] = {
            address: str(outcome) for address, outcome in outcomes.items() if isinstance(outcome, ProbeError)
        }
        if not facts["milliseconds"]:
            self._unreachable = True
            with self._hinting_at_variable(route.endpoint):
                raise route.connect_error(outcomes)
        self._connected = min(facts["milliseconds"], key=facts["milliseconds"].__getitem__)
        stood = ", ".join(
            f"{host_and_port(address, route.port)} in {duration:.1f} ms"
            for address, duration in facts["milliseconds"].items()
        )
        seen = f"connected to {'the proxy ' if route.endpoint.proxy else ''}{stood}"
        if not facts["errors"]:
            return "ok", seen
        failed = "; ".join(f"{address}: {error}" for address, error in facts["errors"].items())
        return "noted", f"{seen}; failed: {failed}"

    def _usable_route(self) -> NetworkRoute:
        self._diagnosable()
        if self._route is None or not self._addresses:
            reason = "there is no address"
            raise _SkippedError(reason)
        return self._route

    def _encrypt(self, facts: dict[str, Any]) -> tuple[str, str]:
        route = self._usable_route()
        if not route.endpoint.tls:
            reason = "connections are not encrypted"
            raise _SkippedError(reason)
        if not self._connected:
            reason = "there is no connection"
            raise _SkippedError(reason)
        try:
            handshake = route.handshake(self._connected)
        except UnsupportedError as exc:
            raise _SkippedError(exc.message) from exc
        authorities = route.endpoint.ca_bundle or "this system"
        certificate = handshake.certificate
        facts.update(version=handshake.version, authorities=route.endpoint.ca_bundle, trusted=handshake.error is None)
        if certificate is not None:
            days = (certificate.ends - datetime.now(timezone.utc)).days
            facts.update(
                subject=certificate.subject,
                issuer=certificate.issuer,
                names=list(certificate.names),
                not_before=certificate.begins.isoformat(),
                not_after=certificate.ends.isoformat(),
                days_left=days,
            )
        if handshake.error is not None or certificate is None:
            raise self._tls_failure(route, facts, handshake.error)
        self._secure = True
        seen = (
            f"{handshake.version}, certificate of {certificate.subject or ', '.join(certificate.names)}, issued by "
            f"{certificate.issuer}, valid until {certificate.ends:%Y-%m-%d} ({days} days), trusted by {authorities}"
        )
        return ("noted" if days < _SOON_DAYS else "ok"), seen

    def _tls_failure(
        self, route: NetworkRoute, facts: Mapping[str, Any], error: BackendError | None
    ) -> ModelExpressError:
        if error is None:
            return BackendError("the server showed no certificate", hint="check host and port")
        if "subject" in facts:
            error.message += (
                f" (of {facts['subject'] or ', '.join(facts['names'])}, issued by {facts['issuer']}, "
                f"valid {facts['not_before'][:10]} to {facts['not_after'][:10]})"
            )
        bundle = route.endpoint.ca_bundle
        named = "" if bundle is None else self._variables_with(bundle)
        source = f", which {named} names" if named else ""
        if bundle is not None and bundle in error.operation:
            error.hint = f"correct {named or 'the setting that names the file'}"
        elif bundle is not None and facts["version"]:
            error.message += f"; trusted are the authorities in {bundle}{source}"
        elif facts["version"]:
            error.message += "; trusted are the authorities of this system (those of the storage's SDK may differ)"
        if error.hint == UNTRUSTED_HINT and (variable := self._authorities_variable()):
            error.hint = f"set {variable} to the file with that authority's certificate"
        return error

    def _authorities_variable(self) -> str:
        """The variable of the plugin that names the file with the trusted authorities; empty if it has none."""
        rows = [] if self._registered is None else self._plugin_settings(self._registered)
        return next((row.name for row in rows if row.name.endswith("_CA_BUNDLE")), "")

    def _compare_clocks(self, facts: dict[str, Any]) -> tuple[str, str]:
        route = self._usable_route()
        if not self._connected or (route.endpoint.tls and not self._secure):
            reason = "there is no connection to ask over"
            raise _SkippedError(reason)
        times = route.server_time(self._connected)
        if times is None:
            reason = "the server does not say what time it is"
            raise _SkippedError(reason)
        there, here = times
        skew = (here - there).total_seconds()
        facts.update(server=there.isoformat(), seconds_ahead=round(skew, 1))
        if abs(skew) <= _MAX_SKEW_SECONDS:
            return "ok", "the server's clock and that of this machine agree"
        side = "ahead of" if skew > 0 else "behind"
        return "noted", (
            f"the clock of this machine is {abs(skew):.0f} s {side} the server's; signatures are refused where "
            "it is some minutes: set it (chronyc tracking, timedatectl)"
        )

    @contextlib.contextmanager
    def _hinting_at_variable(self, endpoint: Endpoint) -> Iterator[None]:
        """Add the variable that sets the host, if one does, to the hint of an error."""
        try:
            yield
        except BackendError as exc:
            proxied = endpoint.proxy is not None
            named = "" if proxied else self._variables_with(endpoint.host)
            if named:
                exc.hint = f"check {named}, which names the host; {exc.hint}"
            elif proxied:
                exc.hint = f"check the variables that name the proxy; {exc.hint}"
            raise

    def _variables_with(self, text: str) -> str:
        """The variables of the plugin whose values contain ``text``."""
        if self._registered is None:
            return ""
        rows = self._plugin_settings(self._registered)
        return " and ".join(row.source for row in rows if row.source != "default" and text in row.value)

    # -- the storage --------------------------------------------------------------------------------------------------

    def _get_credentials(self, facts: dict[str, Any]) -> tuple[str, str]:
        storage = self._diagnosable()
        facts["credentials"] = seen = self._in_time(storage.credentials, "get credentials")
        return "ok", seen

    def _in_time(self, call: Callable[[], _T], operation: str, factor: int = _STORAGE_FACTOR) -> _T:
        return call_with_deadline(self._timeout * factor, call, operation)

    def _reachable(self) -> tuple[ModelURI, Storage]:
        """The storage with one try for each request, so that every failure is seen."""
        _, storage = self._opened()
        if self._unreachable:
            reason = "there is no connection"
            raise _SkippedError(reason)
        uri = cast("ModelURI", self._uri)
        return uri, RetryingStorage(storage, RetryPolicy(attempts=1), RetryBudget(0), uri_of=redacted_uris(uri))

    def _list(self, facts: dict[str, Any]) -> tuple[str, str]:
        uri, storage = self._reachable()
        if uri.path.endswith(SUFFIX):
            self._object = self._in_time(lambda: storage.stat(uri.path), "read the size")
            raise _SkippedError("the URI is that of one file, which needs no listing")
        directory = uri.path.rpartition("/")[0] if uri.path.endswith(INDEX_SUFFIX) else uri.path
        try:
            found = self._in_time(lambda: list(islice(storage.list(directory), _MAX_OBJECTS)), "list the files")
        except (AccessDeniedError, UnsupportedError) as exc:
            facts["listed"] = False
            return self._without_listing(exc)
        facts.update(listed=True, objects=len(found), bytes=sum(info.size for info in found))
        if not found:
            self._all_headers()  # raises the error of a load
        start = f"{directory.rstrip('/')}/" if directory else ""
        relative = {info.path.removeprefix(start): info for info in found}
        likely = sorted(relative, key=lambda name: ("/" in name, not name.endswith(SUFFIX), name))
        self._object = next((relative[name] for name in likely if relative[name].size), None) or self._opened_object()
        more = "at least " if len(found) == _MAX_OBJECTS else ""
        return "ok", f"{more}{len(found)} files, {format_bytes(facts['bytes'])}: {listed(likely, most=3)}"

    def _without_listing(self, denied: BackendError) -> tuple[str, str]:
        """A reader that may not list can load a checkpoint whose files have the usual names."""
        try:
            self._all_headers()
        except (AccessDeniedError, NotFoundError):
            raise denied from None
        self._object = self._opened_object()
        return "noted", (
            "listing is not allowed; the usual names were tried, and the checkpoint was found: loads work, "
            "unless its files are called otherwise"
        )

    def _opened_object(self) -> ObjectInfo | None:
        files = () if self._checkpoint is None else self._checkpoint.files
        return next((ObjectInfo(file.path, file.size, file.version) for file in files), None)

    def _read(self, facts: dict[str, Any]) -> tuple[str, str]:
        _, storage = self._reachable()
        info = self._object
        if info is None:
            reason = "no file is known that could be read"
            raise _SkippedError(reason)
        if not info.size:
            reason = f"{printable(info.path)} is empty"
            raise _SkippedError(reason)
        facts.update(path=info.path, version=info.version)
        begun = time.monotonic()
        start = self._bytes_at(storage, info, 0)
        milliseconds = (time.monotonic() - begun) * 1000
        facts["bytes"] = len(start)
        pinned = f"version {info.version}" if info.version else "which has no version to pin"
        seen = f"{format_bytes(len(start))} of {printable(info.path)} ({pinned}) in {milliseconds:.1f} ms"
        offset = info.size // 2
        if not offset:
            return "ok", seen
        # Weights are read from the middle of files, and not every server has ranges.
        middle = self._bytes_at(storage, info, offset)
        facts["bytes_in_the_middle"] = len(middle)
        self._check_middle(info, start, middle, offset)
        return "ok", f"{seen}, and {format_bytes(len(middle))} from its middle"

    def _bytes_at(self, storage: Storage, info: ObjectInfo, offset: int) -> bytes:
        buffer = memoryview(bytearray(min(_READ_BYTES, info.size - offset)))
        operation = f"read {byte_range(offset, len(buffer))}"
        self._in_time(lambda: storage.read_into(info.path, offset, buffer, version=info.version), operation)
        return bytes(buffer)

    def _check_middle(self, info: ObjectInfo, start: bytes, middle: bytes, offset: int) -> None:
        """Raise if ``middle``, read at ``offset``, has other bytes than the file has there, as far as that is known."""
        overlap = start[offset:]
        same_as_start = middle == start[: len(middle)] and len(set(middle)) > 1
        if middle[: len(overlap)] == overlap and (overlap or not same_as_start):
            return
        uri = cast("ModelURI", self._uri)
        raise IntegrityError(
            "the bytes are those of another part of the file",
            uri=str(uri.with_path(info.path)),
            operation=f"read {byte_range(offset, len(middle))}",
            provider=self._opened()[0].provider.name,
            cause="the server, or a proxy in between, ignores Range, and the storage plugin does not notice",
            hint="read from a server with ranges; report it to the plugin's authors",
        )

    def _open_headers(self, facts: dict[str, Any]) -> tuple[str, str]:
        self._reachable()
        if self._object is None:
            reason = "no file is known that could be read"
            raise _SkippedError(reason)
        checkpoint = self._checkpoint or self._all_headers()
        facts.update(files=len(checkpoint.files), tensors=len(checkpoint.tensors), bytes=checkpoint.tensor_bytes)
        files = format_files(len(checkpoint.files))
        return "ok", f"{len(checkpoint.tensors)} tensors, {format_bytes(checkpoint.tensor_bytes)} in {files}"

    def _all_headers(self) -> Checkpoint:
        """The checkpoint, opened in the way of a load."""
        registered, storage = self._opened()
        loader, uri = cast("Loader", self._loader), cast("ModelURI", self._uri)
        budget = RetryBudget(min(self._timeout * _STORAGE_FACTOR, loader.settings.retry_budget_seconds))
        self._checkpoint = self._in_time(
            lambda: loader.read_headers(uri, registered, storage, budget), "read the headers", _CHECKPOINT_FACTOR
        )
        return self._checkpoint


def _set(rows: list[SettingValue]) -> list[str]:
    return [row.source for row in rows if row.source != "default"]
