"""The steps that every diagnosis takes: settings, the URI, and the network on the way."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from typing import Any, TypeVar

from modelexpress_core.doctor.network import NetworkRoute, call_with_deadline
from modelexpress_core.doctor.step import Step
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import (
    BackendError,
    ModelExpressError,
    SettingsError,
    UnsupportedError,
)
from modelexpress_core.plugins import CORE, PluginManager
from modelexpress_core.probing import ProbeError
from modelexpress_core.registry import Registered
from modelexpress_core.settings import CORE_SETTINGS, SettingValue, describe
from modelexpress_core.tls_errors import UNTRUSTED_HINT
from modelexpress_core.uri import ModelURI, host_and_port

__all__ = ["Examination", "SkippedError", "set_variables"]

_T = TypeVar("_T")

#: A larger difference of clocks is noted: servers refuse signatures if it is some minutes.
_MAX_SKEW_SECONDS = 30

#: A certificate that expires sooner is noted.
_SOON_DAYS = 14


class SkippedError(Exception):
    """A step is skipped; the text says why."""


class Examination:
    """The results of the steps so far.

    Args:
        uri: What is examined.
        environ: Variables to read settings from; None for the process's.
        plugins: Plugins to use; None for all that are installed and allowed.
        timeout_seconds: How long one wait on the network may take.
    """

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
        self._route: NetworkRoute | None = None
        self._addresses: tuple[str, ...] = ()
        self._connected = ""
        self._secure = False
        self._unreachable = False

    def steps(self) -> Iterator[Step]:
        """Take the steps one by one."""
        raise NotImplementedError  # abstract: storages and workers have other steps

    def close(self) -> None:
        """Close what the steps have opened."""

    def _endpoint(self) -> Endpoint:
        """Where a load connects.

        Raises:
            SkippedError: It does not, or that is not known.
        """
        raise NotImplementedError  # abstract, as above

    def _check_connects(self) -> None:
        """Raise SkippedError where ``_endpoint`` would."""
        self._endpoint()

    def _rows(self) -> list[SettingValue]:
        """The settings of the plugin; none before it is known."""
        raise NotImplementedError  # abstract, as above

    def _plugin_settings(self, registered: Registered[Any]) -> list[SettingValue]:
        """The settings of a plugin's record."""
        declared = registered.provider.settings or ()
        classes = declared if isinstance(declared, tuple) else (declared,)
        return [value for cls in classes for value in describe(cls, self._environ, owner=registered.plugin.name)]

    def _take(self, name: str, look: Callable[[dict[str, Any]], tuple[str, str]]) -> Step:
        """Take one step: ``look`` fills in facts, and returns a status and what it has seen."""
        facts: dict[str, Any] = {}
        begun = time.monotonic()
        cause = hint = None
        error = ""
        try:
            status, seen = look(facts)
        except SkippedError as exc:
            status, seen = "skipped", str(exc)
        except ModelExpressError as exc:
            status, seen = "failed", exc.headline
            cause, hint, error = exc.cause, exc.hint, type(exc).__name__
        except Exception as exc:  # noqa: BLE001 - a plugin's
            status, seen = "failed", f"the plugin did not translate {type(exc).__name__}: {exc}"
            hint, error = "report it to the plugin's authors", type(exc).__name__
        milliseconds = 0.0 if status == "skipped" else round((time.monotonic() - begun) * 1000, 3)
        return Step(name, status, seen, milliseconds, facts, cause, hint, error)

    def _read_settings(self, facts: dict[str, Any]) -> tuple[str, str]:
        rows = [row for cls in CORE_SETTINGS for row in describe(cls, self._environ, owner=CORE)]
        chosen = set_variables(rows)
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

    def _to_parse(self) -> ModelURI:
        """The URI, once settings and URI were read."""
        if not self._usable_settings:
            reason = "the settings cannot be used"
            raise SkippedError(reason)
        if self._parsed is None:
            reason = "there is no URI to look up"
            raise SkippedError(reason)
        return self._parsed

    # -- the network --------------------------------------------------------------------------------------------------

    def _look_up(self, facts: dict[str, Any]) -> tuple[str, str]:
        endpoint = self._endpoint()
        self._route = route = NetworkRoute(endpoint, self._timeout)
        facts.update(host=endpoint.host, port=endpoint.port, proxy=self._proxy(route))
        through = f"{endpoint.host} is left to the proxy {facts['proxy']}; " if facts["proxy"] else ""
        if route.is_address:
            self._addresses = (route.host,)
            raise SkippedError(f"{through}{route.host} is an address")
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
        self._check_connects()
        if self._route is None or not self._addresses:
            reason = "there is no address"
            raise SkippedError(reason)
        return self._route

    def _encrypt(self, facts: dict[str, Any]) -> tuple[str, str]:
        route = self._usable_route()
        if not route.endpoint.tls:
            reason = "connections are not encrypted"
            raise SkippedError(reason)
        if not self._connected:
            reason = "there is no connection"
            raise SkippedError(reason)
        try:
            handshake = route.handshake(self._connected)
        except UnsupportedError as exc:
            raise SkippedError(exc.message) from exc
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
        return next((row.name for row in self._rows() if row.name.endswith("_CA_BUNDLE")), "")

    def _compare_clocks(self, facts: dict[str, Any]) -> tuple[str, str]:
        route = self._usable_route()
        if not self._connected or (route.endpoint.tls and not self._secure):
            reason = "there is no connection to ask over"
            raise SkippedError(reason)
        times = route.server_time(self._connected)
        if times is None:
            reason = "the server does not say what time it is"
            raise SkippedError(reason)
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
        return " and ".join(row.source for row in self._rows() if row.source != "default" and text in row.value)

    def _in_time(self, call: Callable[[], _T], operation: str, factor: int = 1) -> _T:
        return call_with_deadline(self._timeout * factor, call, operation)


def set_variables(rows: list[SettingValue]) -> list[str]:
    """The variables that are set."""
    return [row.source for row in rows if row.source != "default"]
