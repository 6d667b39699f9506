"""Who calls, and whether they may: for every service of a server or of a worker, but those of health.

An ``Authenticator`` says who a call is from. Those here know tokens from a file, and certificates; one that asks an
authority elsewhere (that of a cluster, say) is one more class with that one method.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from typing import Any

import grpc
import grpc.aio

from modelexpress_core.contracts.authenticator import Authenticator, Call, Refusal, RefusedError
from modelexpress_core.errors import SettingsError
from modelexpress_core.wire.around import Around, Context, Interceptor
from modelexpress_core.wire.files import Files, read_bytes
from modelexpress_core.wire.rpc import HEALTH, STANDARD_HEALTH
from modelexpress_core.wire.settings import AuthSettings

__all__ = [
    "Authenticated",
    "Certificates",
    "Tokens",
    "authenticator",
    "caller",
]

#: Who makes the call that is being answered; empty where nobody has to prove who they are.
caller: ContextVar[str] = ContextVar("caller", default="")

#: Services that anybody may ask.
_OPEN = frozenset({HEALTH.name, STANDARD_HEALTH.name})

#: What looks like a digest and is none is no token: who can read the file must not be able to use what stands there.
_LINE = re.compile(
    r"(?P<name>[^:\s]+):(?:(?i:sha256):(?P<digest>[0-9a-fA-F]{64})|(?!(?i:sha256):)(?P<token>[\x21-\x7e]+))"
)

#: A shorter one can be guessed.
_SHORTEST_TOKEN = 16


class Tokens:
    """Callers by their tokens, from a file.

    Each line is ``name:token`` or ``name:sha256:`` with the token's digest; empty lines and those that begin with ``#``
    say nothing. A name may have several tokens, so that one can be replaced without a gap.

    Args:
        path: The file; read again whenever it changes.

    Raises:
        SettingsError: It cannot be read, or a line makes no sense.
    """

    by_certificate = False

    def __init__(self, path: str) -> None:
        self._files = Files((path,), lambda: _read_tokens(path))

    async def authenticate(self, call: Call) -> str:
        """Who has the token."""
        if call.token is None:
            raise RefusedError(Refusal.UNAUTHENTICATED, "a token is wanted, and none was sent")
        given = hashlib.sha256(call.token.encode("utf-8", "surrogateescape")).digest()
        found = ""
        for digest, name in self._files.value().items():
            if hmac.compare_digest(digest, given):  # and on, so that all take the same time
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
        raise _bad_tokens(path, "it is no text") from exc
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise _bad_tokens(path, f"line {number} is neither name:token nor name:sha256:digest")
        if match["token"] is not None and len(match["token"]) < _SHORTEST_TOKEN:
            raise _bad_tokens(path, f"line {number} has a token of fewer than {_SHORTEST_TOKEN} characters")
        digest = bytes.fromhex(match["digest"]) if match["digest"] else hashlib.sha256(match["token"].encode()).digest()
        if names.setdefault(digest, match["name"]) != match["name"]:
            raise _bad_tokens(path, f"line {number} has the token of another name")
    if not names:
        raise _bad_tokens(path, "it has no tokens in it")
    return names


def _bad_tokens(path: str, problem: str) -> SettingsError:
    return SettingsError(
        f"the file of tokens that MX_AUTH_TOKENS_PATH names cannot be used: {path}: {problem}",
        hint="write a line name:token for each caller; `openssl rand -hex 32` makes a token",
    )


class Certificates:
    """Callers by their certificates, which TLS has verified."""

    by_certificate = True

    async def authenticate(self, call: Call) -> str:
        """The first name in the certificate: of its alternative names, else of its subject."""
        if not call.names:
            raise RefusedError(Refusal.UNAUTHENTICATED, "a certificate with a name in it is wanted, and none was shown")
        return call.names[0]


def authenticator(settings: AuthSettings) -> Authenticator | None:
    """What ``settings`` ask for; None where everybody is answered.

    Raises:
        SettingsError: The file of tokens makes no sense.
    """
    if settings.mode == "token":
        assert settings.tokens is not None  # noqa: S101 - for the type checker: the settings have checked it
        return Tokens(settings.tokens)
    return Certificates() if settings.mode == "mtls" else None


class Authenticated(Interceptor):
    """Refuses calls of unknown or forbidden callers, whatever the service, and tells the others' names as ``caller``.

    Args:
        authenticator: Who knows them.
    """

    def __init__(self, authenticator: Authenticator) -> None:
        self._authenticator = authenticator

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: Any,  # noqa: ANN401 - as gRPC has it
    ) -> Any:  # noqa: ANN401 - a handler, or None
        """The handler of a call; where the caller is refused, one that reads nothing: strangers fill no memory."""
        if self._authenticator.by_certificate or _is_open(handler_call_details):
            return await super().intercept_service(continuation, handler_call_details)
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        try:
            # What is set here is seen where the call is answered: gRPC does both in one task.
            caller.set(await self._authenticator.authenticate(Call(_token(handler_call_details.invocation_metadata))))
        except RefusedError as exc:
            return _refusal(exc)
        return handler

    def around(self, details: grpc.HandlerCallDetails) -> Around | None:
        """The door, for those who show a certificate: TLS let nobody in who has none."""
        if _is_open(details):
            return None
        token = _token(details.invocation_metadata)

        @contextlib.asynccontextmanager
        async def admitted(context: Context) -> AsyncIterator[None]:
            try:
                caller.set(await self._authenticator.authenticate(Call(token, _names(context.auth_context()))))
            except RefusedError as exc:
                await context.abort(grpc.StatusCode[exc.refusal.name], exc.reason)
            yield

        return admitted


def _is_open(details: Any) -> bool:  # noqa: ANN401 - as gRPC has it
    return details.method.strip("/").partition("/")[0] in _OPEN


def _refusal(exc: RefusedError) -> grpc.RpcMethodHandler[Any, Any]:
    """Answers any kind of call without reading a message of it."""

    async def refuse(_: object, context: Context) -> None:
        await context.abort(grpc.StatusCode[exc.refusal.name], exc.reason)

    return grpc.stream_stream_rpc_method_handler(refuse)


def _token(metadata: Any) -> str | None:  # noqa: ANN401 - pairs, in gRPC's own class
    for key, value in metadata or ():
        if key == "authorization" and isinstance(value, str):
            scheme, _, token = value.partition(" ")
            if scheme.lower() == "bearer" and token.strip():
                return token.strip()
    return None


def _names(proven: Mapping[str, Iterable[bytes]]) -> Sequence[str]:
    """The names in a client's certificate: alternative ones first, then the common name, then the whole subject."""
    keys = ("x509_subject_alternative_name", "x509_common_name", "x509_subject")
    found = (name.decode("utf-8", "replace") for key in keys for name in proven.get(key, ()))
    return tuple(name for name in found if name)
