"""``mx serve``: runs the server, which keeps which worker holds which model."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from modelexpress_core.cli.interruption import signal_exit_code
from modelexpress_core.cli.output import console, exit_code, package_missing, set_log_level, silence_grpc
from modelexpress_core.contracts.metadata_store import StoreUnavailableError
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import InvalidURIError, ModelExpressError, SettingsError
from modelexpress_core.messages import hide_credentials, printable, with_hint
from modelexpress_core.plugins import CORE, METADATA_STORE, PluginManager
from modelexpress_core.server.logs import announce, write_log
from modelexpress_core.server.settings import (
    CacheSettings,
    ConfigPath,
    LimitSettings,
    LogSettings,
    SecurityVariables,
    ServerSettings,
    SpanSettings,
    StoreVariables,
    directory_path,
    has_stray_password,
)
from modelexpress_core.settings import Override, SettingSources, find_problems, from_env
from modelexpress_core.uri import ModelURI, host_and_port
from modelexpress_core.wire.settings import AuthSettings, TlsSettings

if TYPE_CHECKING:
    from modelexpress_core.server.config import Config

__all__ = ["serve"]

_log = logging.getLogger(__name__)

#: Settings classes that only variables set.
_VARIABLES = (SecurityVariables, StoreVariables, SpanSettings)

#: Settings class of each section of the configuration file; the empty name is its top.
_SECTIONS = {
    "": ServerSettings,
    "cache": CacheSettings,
    "limits": LimitSettings,
    "tls": TlsSettings,
    "auth": AuthSettings,
    "log": LogSettings,
}


def serve(
    context: typer.Context,
    *,
    host: Annotated[str | None, typer.Option(help="Address to listen on.", metavar="ADDRESS")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the gRPC services.", min=0, max=65535)] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Port of the metrics.", min=0, max=65535)] = None,
    health_port: Annotated[
        int | None, typer.Option(help="Port of health alone, without TLS, for probes.", min=0, max=65535)
    ] = None,
    metadata: Annotated[
        str | None, typer.Option(help="Where metadata is kept: memory:// or redis://host:6379/0", metavar="URI")
    ] = None,
    cache_dir: Annotated[
        str | None,
        typer.Option(help="Directory in which the server keeps models that it downloads.", metavar="DIR"),
    ] = None,
    log_format: Annotated[
        str | None, typer.Option(help="text for people, json for programs; logs go to stderr.", metavar="FORMAT")
    ] = None,
    config: Annotated[
        str | None, typer.Option(help="YAML file with settings; variables and flags win over it.", metavar="FILE")
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Show all settings and where each came from, or why a server cannot start here; serve nothing.",
        ),
    ] = False,
) -> None:
    """Run a server: workers publish the models that they hold, and others find them; it also keeps models in a cache.

    Ends on SIGTERM or Ctrl-C.
    """
    overrides = {
        key: Override(value, f"--{key.replace('_', '-')}")
        for key, value in {
            "host": host,
            "port": port,
            "metrics_port": metrics_port,
            "health_port": health_port,
            "metadata": metadata,
        }.items()
        if value is not None
    }
    if cache_dir is not None:
        overrides["cache.directory"] = Override(_directory(cache_dir), "--cache-dir")
    if log_format is not None:
        overrides["log.format"] = Override(_known_format(log_format), "--log-format")
    root = context.find_root()
    if getattr(root.get_parameter_source("log_level"), "name", "") == "COMMANDLINE":
        overrides["log.level"] = Override(root.params["log_level"].lower(), "--log-level")
    settings = _settings(config, overrides)
    if check:
        _print(settings)
        return
    log = settings.get(LogSettings)
    try:
        write_log(log)
    except ModuleNotFoundError as exc:
        raise package_missing("a log in JSON", exc) from exc
    set_log_level(log.level.upper())
    if log.format == "text":
        raise typer.Exit(_serve(settings))
    try:
        code = _serve(settings)
    except ModelExpressError as exc:
        _log.error(exc.headline, extra={"error": type(exc).__name__, "cause": exc.cause, "hint": exc.hint})
        raise typer.Exit(exit_code(exc)) from exc
    except Exception as exc:
        _log.exception("the server failed")
        raise typer.Exit(1) from exc
    raise typer.Exit(code)


def _known_format(text: str) -> str:
    if text not in {"text", "json"}:
        message = f"{hide_credentials(text)!r} is none of text, json"
        raise typer.BadParameter(message, param_hint="--log-format")
    return text


def _directory(text: str) -> str:
    try:
        return directory_path(text)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--cache-dir") from exc


def _settings(path: str | None, overrides: dict[str, Override]) -> Config:
    silence_grpc()
    try:
        from modelexpress_core.server.config import read_config
    except ModuleNotFoundError as exc:
        raise package_missing("the server", exc) from exc
    path = from_env(ConfigPath).path if path is None else path
    return read_config(_SECTIONS, os.environ, path=path, overrides=overrides, also=_VARIABLES, complete=_complete)


def _complete(config: Config) -> tuple[Config, list[str]]:
    """``config`` with the metadata URI from the variables of existing deployments, and problems of several settings."""
    problems: list[str] = []
    if "metadata" in config.defaults(ServerSettings) and not find_problems(StoreVariables, SettingSources(os.environ)):
        try:
            usual = from_env(StoreVariables).metadata()
        except SettingsError as exc:
            problems.append(with_hint(exc.message, exc.hint))
        else:
            config = config.with_fallbacks(ServerSettings, {"metadata": usual} if usual else {})
    config, contradiction = _with_security_mode(config)
    problems += contradiction
    metadata, source = config.usable(ServerSettings).get("metadata", ("memory://", ""))
    wrong = _wrong_with_uri(metadata)
    problems += [f"metadata (from {source}): {wrong}"] if wrong else []
    try:
        auth, tls = config.get(AuthSettings), config.get(TlsSettings)
    except SettingsError:  # which is reported by itself
        return config, problems
    try:
        auth.check(tls)
    except SettingsError as exc:
        problems.append(with_hint(exc.message, exc.hint))
    return config, problems


def _with_security_mode(config: Config) -> tuple[Config, list[str]]:
    """``config`` with the mode of authentication from the variable of existing deployments, or why it cannot be."""
    if find_problems(SecurityVariables, SettingSources(os.environ)):  # which are reported by themselves
        return config, []
    usual = from_env(SecurityVariables).auth_mode()
    if usual is None:
        return config, []
    if "mode" in config.defaults(AuthSettings):
        return config.with_fallbacks(AuthSettings, {"mode": usual}), []
    mode, source = config.usable(AuthSettings).get("mode", (usual.value, ""))
    if mode == usual.value:
        return config, []
    said = f"auth.mode is {mode} (from {source}), and MODEL_EXPRESS_SECURITY_MODE is enforce, which means {usual.value}"
    return config, [with_hint(said, "unset one of them")]


def _wrong_with_uri(metadata: str) -> str:
    """Why ``metadata`` names no metadata store, without secrets; empty if it may name one."""
    if has_stray_password(metadata):
        hint = "percent-encode the password: / is %2F, ? is %3F, # is %23, @ is %40"
        return f"an at sign after the host (the value is not shown); {hint}"
    try:
        ModelURI.parse(metadata)
    except InvalidURIError as exc:
        return with_hint(exc.message, exc.hint)
    return "" if "://" in metadata else "no URI (the value is not shown); write it as redis://host:6379/0 is written"


def _check_files(tls: TlsSettings, auth: AuthSettings, plugins: PluginManager) -> None:
    """Check the authenticator, and the files that settings name.

    Raises:
        SettingsError: Some cannot be used; all of them are named.
    """
    try:
        from modelexpress_core.server.environment import with_settings
        from modelexpress_core.wire.authentication import open_authenticator
        from modelexpress_core.wire.tls import ClientTls, server_credentials
    except ModuleNotFoundError as exc:
        raise package_missing("the server", exc) from exc
    problems = []
    by_certificate = False
    try:
        authenticator = open_authenticator(auth, plugins, with_settings(os.environ, tls, auth))
        by_certificate = authenticator is not None and authenticator.by_certificate
    except SettingsError as exc:
        problems.append(with_hint(exc.message, exc.hint))
    try:
        if tls.certificate is not None:
            server_credentials(tls, require_client_certificate=by_certificate)
        elif tls.files:
            ClientTls(tls)
    except SettingsError as exc:
        problems.append(with_hint(exc.message, exc.hint))
    if problems:
        message = "settings that cannot be used:\n  " + "\n  ".join(problems)
        raise SettingsError(message, hint="correct the files, or the settings that name them")


def _print(config: Config) -> None:
    """Print each setting with its value and its source, if a server could start with all of them here and now."""
    plugins = PluginManager.discover()
    plugins.table(METADATA_STORE).lookup(ModelURI.parse(config.get(ServerSettings).metadata).scheme)
    _check_files(config.get(TlsSettings), config.get(AuthSettings), plugins)
    _check_start(config, plugins)
    out = console()
    for key, value in config.describe(CORE):
        source = "" if value.source == "default" else f" (from {value.source})"
        shown = (printable(value.value), "") if value.value else ("not set", "dim")
        out.print(Text.assemble((key, "bold"), " = ", shown, (source, "dim")), soft_wrap=True)


def _check_start(config: Config, plugins: PluginManager) -> None:
    """Check what a server does before it serves.

    Raises:
        ModelExpressError: A port cannot be listened on, a package or a plugin fails.
    """
    try:
        from modelexpress_core.server.app import Server
        from modelexpress_core.server.ports import port_problems
        from modelexpress_core.server.tracing import exported_spans
    except ModuleNotFoundError as exc:
        raise package_missing("the server", exc) from exc
    settings, log = config.get(ServerSettings), config.get(LogSettings)
    problems = port_problems(settings)
    if problems:
        message = "the server cannot start:\n  " + "\n  ".join(problems)
        hint = "end the program that uses the port, or choose another port or address"
        raise ModelExpressError(message, hint=hint)
    try:
        write_log(log)
    except ModuleNotFoundError as exc:
        raise package_missing("a log in JSON", exc) from exc

    async def check() -> None:
        _, store = plugins.open(METADATA_STORE, ModelURI.parse(settings.metadata), os.environ)
        server = Server(
            settings,
            store,
            plugins,
            tls=config.get(TlsSettings),
            auth=config.get(AuthSettings),
            limits=config.get(LimitSettings),
            cache=config.get(CacheSettings),
            environ=os.environ,
        )
        try:
            await server.check()
        except StoreUnavailableError as exc:
            _log.warning("the metadata store does not answer, so a server would answer calls with UNAVAILABLE: %s", exc)

    with exported_spans(from_env(SpanSettings)):
        asyncio.run(check())


def _serve(config: Config) -> int:
    """Serve until a signal comes; returns its exit code."""
    try:
        from modelexpress_core.server.tracing import exported_spans
    except ModuleNotFoundError as exc:
        raise package_missing("the server", exc) from exc
    with exported_spans(from_env(SpanSettings)):
        return asyncio.run(
            _run(
                config.get(ServerSettings),
                config.get(TlsSettings),
                config.get(AuthSettings),
                config.get(LimitSettings),
                config.get(CacheSettings),
            )
        )


async def _run(
    settings: ServerSettings, tls: TlsSettings, auth: AuthSettings, limits: LimitSettings, cache: CacheSettings
) -> int:
    try:
        from modelexpress_core.server.app import Server
        from modelexpress_core.server.files import raise_limit
        from modelexpress_core.server.garbage import collect_seldom
    except ModuleNotFoundError as exc:
        raise package_missing("the server", exc) from exc
    raise_limit()
    end = _end_signal()
    uri = ModelURI.parse(settings.metadata)
    plugins = PluginManager.discover()
    _, store = plugins.open(METADATA_STORE, uri, os.environ)
    server = Server(settings, store, plugins, tls=tls, auth=auth, limits=limits, cache=cache, environ=os.environ)
    collect_seldom()
    async with server:
        grpc = host_and_port(settings.host, server.port)
        metrics = f"{host_and_port(settings.host, server.metrics_port)}/metrics"
        health = host_and_port(settings.host, server.health_port) if server.health_port else ""
        announce(
            f"serving on {grpc}, metrics on {metrics}, metadata in {uri}" + (f", health on {health}" if health else ""),
            grpc=grpc,
            metrics=metrics,
            metadata=str(uri),
            health=health or None,
        )
        if warning := risk(settings.host, auth, tls):
            _log.warning("%s", warning)
        if cache.directory is not None:
            channel = f"sent as raw bytes on port {server.bulk_port}" if server.bulk_port else "sent over gRPC alone"
            _log.info("models are kept in %s, and %s", cache.directory, channel)
            if server.bulk_port not in {0, cache.bulk_port}:
                _log.warning("port %d is in use: raw bytes have port %d", cache.bulk_port, server.bulk_port)
        _log.info("authentication: %s; TLS: %s", auth.mode, "no" if tls.certificate is None else "yes")
        number = await end
        announce("ending: calls in flight may end first")
    return signal_exit_code(number)


def risk(host: str, auth: AuthSettings, tls: TlsSettings) -> str:
    """What is not safe about a server that listens on ``host``; empty if it is reached from this machine alone."""
    if Endpoint(host.strip("[]"), 0).is_loopback:
        return ""
    if auth.mode == "off":
        return (
            f"MX_AUTH_MODE is off and the server listens on {host}: every program that reaches it can publish workers, "
            "and readers take weights from them"
        )
    return "" if tls.certificate is not None else "callers send tokens without TLS: others on the network can read them"


def _end_signal() -> asyncio.Future[int]:
    """The first SIGTERM or SIGINT that comes, from now on: also while the server starts."""
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[int] = loop.create_future()

    def end(number: int) -> None:
        if not ended.done():
            ended.set_result(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, end, number)
    return ended
