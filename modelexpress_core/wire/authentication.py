"""Authentication of the calls that a server or a worker answers: for every service except those of health.

An ``Authenticator`` names the caller of a call. ``MX_AUTH_MODE`` selects one that a plugin registers. Those here, by
tokens in a file and by certificates, are registered by core's own plugin.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import grpc
import grpc.aio

from modelexpress_core.contracts.authenticator import Authenticator, Call, Refusal, RefusedError
from modelexpress_core.errors import PluginLoadError, SettingsError
from modelexpress_core.plugins import AUTHENTICATOR, PluginManager
from modelexpress_core.wire.files import WatchedFiles, read_bytes
from modelexpress_core.wire.interception import CallScope, Interceptor
from modelexpress_core.wire.rpc import HEALTH, STANDARD_HEALTH, RpcContext, RpcHandler, split_path
from modelexpress_core.wire.settings import AuthSettings

__all__ = [
    "AuthInterceptor",
    "CertificateAuthenticator",
    "TokenAuthenticator",
    "caller",
    "certificate_names",
    "open_authenticator",
]

_log = logging.getLogger(__name__)

#: Name of the caller of the call that is being answered; empty if callers are not authenticated.
caller: ContextVar[str] = ContextVar("caller", default="")

#: Services that answer every caller.
_OPEN_SERVICES = frozenset({HEALTH.name, STANDARD_HEALTH.name})

#: A line with a malformed digest is no token either: a reader of the file could use it.
_LINE = re.compile(
    r"(?P<name>[^:\s]+):(?:(?i:sha256):(?P<digest>[0-9a-fA-F]{64})|(?!(?i:sha256):)(?P<token>[\x21-\x7e]+))"
)

#: A shorter one can be guessed.
_SHORTEST_TOKEN = 16


class TokenAuthenticator:
    """Authenticates by tokens in a file.

    Each line is ``name:token``, or ``name:sha256:`` and the token's digest. Empty lines and lines that begin with ``#``
    are skipped. A name may have several tokens, so that one can be replaced without a gap.

    Args:
        path: The file; it is read again when it has changed.

    Raises:
        SettingsError: The file cannot be read, or has a line that cannot be used.
    """

    by_certificate = False

    def __init__(self, path: str) -> None:
        self._names = WatchedFiles((path,), lambda: _read_tokens(path))

    async def authenticate(self, call: Call) -> str:
        """The name that the token belongs to."""
        if call.token is None:
            raise RefusedError(Refusal.UNAUTHENTICATED, "a token is wanted, and none was sent")
        given = hashlib.sha256(call.token.encode("utf-8", "surrogateescape")).digest()
        found = ""
        for digest, name in self._names.value().items():
            if hmac.compare_digest(digest, given):  # no break, so that all tokens take the same time
                found = name
        if not found:
            raise RefusedError(Refusal.UNAUTHENTICATED, "the token is not one that is known here")
        return found


def _read_tokens(path: str) -> Mapping[bytes, str]:
    """Names by the digests of their tokens."""
    names: dict[bytes, str] = {}
    try:
        text = read_bytes(path, "MX_AUTH_TOKENS_PATH").decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        raise _unusable_tokens(path, "it is no text") from exc
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise _unusable_tokens(path, f"line {number} is neither name:token nor name:sha256:digest")
        if match["token"] is not None and len(match["token"]) < _SHORTEST_TOKEN:
            raise _unusable_tokens(path, f"line {number} has a token of fewer than {_SHORTEST_TOKEN} characters")
        digest = bytes.fromhex(match["digest"]) if match["digest"] else hashlib.sha256(match["token"].encode()).digest()
        if names.setdefault(digest, match["name"]) != match["name"]:
            raise _unusable_tokens(path, f"line {number} has the token of another name")
    if not names:
        raise _unusable_tokens(path, "it has no tokens in it")
    return names


def _unusable_tokens(path: str, problem: str) -> SettingsError:
    return SettingsError(
        f"the file of tokens that MX_AUTH_TOKENS_PATH names cannot be used: {path}: {problem}",
        hint="write a line name:token for each caller; `openssl rand -hex 32` makes a token",
    )


class CertificateAuthenticator:
    """Authenticates by client certificate, once TLS has verified it."""

    by_certificate = True

    async def authenticate(self, call: Call) -> str:
        """The first name in the certificate: an alternative name, or else the subject's."""
        if not call.names:
            raise RefusedError(Refusal.UNAUTHENTICATED, "a certificate with a name in it is wanted, and none was shown")
        return call.names[0]


def open_authenticator(
    settings: AuthSettings, plugins: PluginManager, environ: Mapping[str, str]
) -> Authenticator | None:
    """The authenticator that ``settings`` select; None for the mode ``off``, which answers every caller.

    Args:
        settings: Their mode is the name of an authenticator.
        plugins: Plugins that may offer one.
        environ: Variables, for its factory.

    Raises:
        SettingsError: No usable plugin offers it, or its own settings cannot be used.
        PluginError: Two plugins offer it, or its factory failed.
    """
    if settings.mode == "off":
        return None
    try:
        plugins.named(AUTHENTICATOR, settings.mode)
    except SettingsError as exc:
        message = f"MX_AUTH_MODE is {settings.mode!r}: {exc.message}"
        hint = "set MX_AUTH_MODE to one that is installed, or to off, which answers everybody; `mx plugins` lists them"
        raise SettingsError(message, hint=hint) from exc
    authenticator = plugins.open_named(AUTHENTICATOR, settings.mode, environ)
    if not isinstance(getattr(authenticator, "by_certificate", None), bool):
        plugin = plugins.named(AUTHENTICATOR, settings.mode).plugin.name
        message = f"the authenticator {settings.mode!r} does not say whether it authenticates by certificate"
        raise PluginLoadError(message, plugin=plugin, hint="give it the attribute by_certificate: True or False")
    return authenticator


class AuthInterceptor(Interceptor):
    """Authenticates each call, refuses those that the authenticator refuses, and sets ``caller`` for the others.

    Services of health answer every caller.

    Args:
        authenticator: Names the callers.
        open_methods: Paths of further methods that answer every caller, such as those whose requests hold a secret.
    """

    def __init__(self, authenticator: Authenticator, open_methods: Iterable[str] = ()) -> None:
        self._authenticator = authenticator
        self._open_methods = frozenset(open_methods)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: Any,  # noqa: ANN401 - as gRPC has it
    ) -> Any:  # noqa: ANN401 - a handler, or None
        """The handler of a call.

        If the metadata alone decide, a refused call gets a handler that reads no message: strangers fill no memory.
        Names in certificates are known only within the handler.
        """
        if self._authenticator.by_certificate or self._is_open(handler_call_details):
            return await super().intercept_service(continuation, handler_call_details)
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        try:
            # A context variable that is set here is seen by the handler: gRPC runs both in one task.
            caller.set(await self._authenticate(Call(_token(handler_call_details.invocation_metadata))))
        except _NotAnsweredError as exc:
            return _refusing_handler(exc)
        return handler

    def scope(self, details: grpc.HandlerCallDetails) -> CallScope | None:
        """Authenticates within the call, where the names in the certificate are known."""
        if self._is_open(details):
            return None
        token = _token(details.invocation_metadata)

        @contextlib.asynccontextmanager
        async def authenticated(context: RpcContext) -> AsyncIterator[None]:
            try:
                caller.set(await self._authenticate(Call(token, certificate_names(context.auth_context()))))
            except _NotAnsweredError as exc:
                await context.abort(exc.code, exc.reason)
            yield

        return authenticated

    def _is_open(self, details: Any) -> bool:  # noqa: ANN401 - as gRPC has it
        return details.method in self._open_methods or split_path(details.method)[0] in _OPEN_SERVICES

    async def _authenticate(self, call: Call) -> str:
        try:
            name = await self._authenticator.authenticate(call)
        except RefusedError as exc:
            raise _NotAnsweredError(grpc.StatusCode[exc.refusal.name], exc.reason) from exc
        except Exception as exc:
            _log.exception("the authenticator failed")
            raise _NotAnsweredError(grpc.StatusCode.INTERNAL, _FAILED) from exc
        if not name or not isinstance(name, str):  # records of an empty name belong to all
            _log.error("the authenticator returned no name")
            raise _NotAnsweredError(grpc.StatusCode.INTERNAL, _FAILED)
        return name


_FAILED = "the server could not authenticate the caller; its log says why"


class _NotAnsweredError(Exception):
    """A call is not answered, with this status and this text."""

    def __init__(self, code: grpc.StatusCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def _refusing_handler(exc: _NotAnsweredError) -> RpcHandler:
    """Answers any kind of call without reading a message of it."""

    async def refuse(_: object, context: RpcContext) -> None:
        await context.abort(exc.code, exc.reason)

    return grpc.stream_stream_rpc_method_handler(refuse)


def _token(metadata: Any) -> str | None:  # noqa: ANN401 - pairs, in a class of gRPC
    for key, value in metadata or ():
        if key == "authorization" and isinstance(value, str):
            scheme, _, token = value.partition(" ")
            if scheme.lower() == "bearer" and token.strip():
                return token.strip()
    return None


def certificate_names(proven: Mapping[str, Iterable[bytes]]) -> Sequence[str]:
    """The names in a client's certificate: alternative ones first, then the common name, then the whole subject."""
    keys = ("x509_subject_alternative_name", "x509_common_name", "x509_subject")
    found = (name.decode("utf-8", "replace") for key in keys for name in proven.get(key, ()))
    return tuple(name for name in found if name)
