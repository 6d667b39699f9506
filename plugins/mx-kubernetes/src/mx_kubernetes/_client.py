"""Requests to the API server of Kubernetes: where it is, one request with its retries, and one watch.

kubernetes_asyncio finds the API server and the credentials (pods, kubeconfig with all of its ways to log in), renews
tokens, and sends requests within an event loop. The official client is its twin for threads. The objects here are
plain dictionaries, which are cheaper than the models of either: a watch has a few thousand events at once.
"""

from __future__ import annotations

import asyncio
import contextvars
import email.utils
import json
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import Any

import aiohttp
from attrs import frozen
from kubernetes_asyncio.client import Configuration
from kubernetes_asyncio.client.api_client import ApiClient
from kubernetes_asyncio.config import ConfigException
from kubernetes_asyncio.config.incluster_config import InClusterConfigLoader
from kubernetes_asyncio.config.kube_config import load_kube_config

from modelexpress_core.errors import SettingsError
from modelexpress_core.server.deadlines import time_out
from modelexpress_core.settings import from_env
from mx_kubernetes._errors import ApiError, is_transient, reason_of
from mx_kubernetes.settings import ConnectionSettings

__all__ = ["APPLY", "MERGE", "Kubernetes", "Object", "in_background"]

_log = logging.getLogger(__name__)

Object = dict[str, Any]

_JSON = "application/json"
APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"

#: Time-out of a request with all its tries: in all less than clients wait.
_REQUEST_SECONDS = 4.0
_TRIES = 3
_FIRST_WAIT_SECONDS = 0.1

#: Bytes of an answer that are read at most; a page of a list has a fraction of it.
_MAX_ANSWER_BYTES = 64 << 20
_MAX_ERROR_BYTES = 64 << 10

#: An answer may be some seconds under way.
_MAX_CLOCK_DIFFERENCE_SECONDS = 10.0
_WARNING_SECONDS = 600.0

#: A kubeconfig is read again after a refused request, for credentials that a program makes and that run out.
_REREAD_SECONDS = 60.0

_KUBECONFIG = "~/.kube/config"

#: Where Kubernetes puts the credentials of a pod.
_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


@frozen
class _Request:
    """A request, as ``Kubernetes.request`` takes it."""

    method: str
    path: str
    operation: str
    query: Mapping[str, str | int]
    body: Object | None = None
    content_type: str = _JSON
    accept: str = _JSON


class Kubernetes:
    """The API server. Connects at first use, within the event loop that it is then used in.

    Args:
        settings: Variables that say where it is.
        account: Directory with the token, the namespace and the certificate authority of a pod.
        wall_clock: Seconds since 1970.

    Raises:
        SettingsError: Nothing says where the API server is.
    """

    def __init__(
        self, settings: Mapping[str, str], account: str = _ACCOUNT, *, wall_clock: Callable[[], float] = time.time
    ) -> None:
        self._account = account
        self._wall_clock = wall_clock
        self._warn_at = float("-inf")
        self._settings = from_env(ConnectionSettings, settings)
        self._in_pod = self._settings.kubeconfig is None and self._settings.host is not None
        self._path = os.path.expanduser(self._settings.kubeconfig or _KUBECONFIG)
        # KUBECONFIG may name several files.
        files = self._path.split(os.pathsep)
        if not self._in_pod and not any(os.path.isfile(file) for file in files):
            message = (
                f"no API server of Kubernetes is known: this program runs in no pod, and there is no file {files[0]}"
            )
            hint = "set KUBECONFIG to a file with the address of the API server, or run the program in a pod"
            raise SettingsError(message, hint=hint)
        token = os.path.join(account, "token")
        if self._in_pod and not os.path.isfile(token):
            message = f"the pod has no token for the API server of Kubernetes: {token} does not exist"
            raise SettingsError(message, hint="set automountServiceAccountToken: true for the pod")
        self._client: ApiClient | None = None
        self._clients: list[ApiClient] = []
        self._read_at = 0.0
        self._opening = asyncio.Lock()
        self._namespace = ""

    async def namespace(self) -> str:
        """The namespace of the pod, or of the current context of the kubeconfig.

        Raises:
            ApiError: The kubeconfig cannot be used.
        """
        await self._opened()
        return self._namespace

    async def close(self) -> None:
        """Close the connections."""
        self._client = None
        while self._clients:
            await self._clients.pop().close()

    async def request(
        self,
        method: str,
        path: str,
        *,
        operation: str,
        query: Mapping[str, str | int] | None = None,
        body: Object | None = None,
        content_type: str = _JSON,
        accept: str = _JSON,
        seconds: float = _REQUEST_SECONDS,
    ) -> Object:
        """Send a request; return the object in the answer.

        A request that fails for a moment is sent again, whatever its method: those of callers may arrive twice.

        Raises:
            ApiError: It failed.
        """
        request = _Request(method, path, operation, query or {}, body, content_type, accept)
        deadline = time.monotonic() + time_out(seconds)
        wait = _FIRST_WAIT_SECONDS
        for left in reversed(range(_TRIES)):
            try:
                return await self._send(request, deadline)
            except ApiError as exc:
                pause = exc.retry_after_seconds or random.uniform(0, wait)  # noqa: S311 - it only spreads requests
                if not left or not is_transient(exc) or time.monotonic() + pause >= deadline:
                    raise
            await asyncio.sleep(pause)
            wait *= 4
        raise AssertionError

    async def _send(self, request: _Request, deadline: float) -> Object:
        timeout = aiohttp.ClientTimeout(total=max(0.001, deadline - time.monotonic()))
        response = await self._respond(request, timeout)
        try:
            return _parsed(await _read(response, _MAX_ANSWER_BYTES, request.operation), request.operation)
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as exc:
            raise ApiError(request.operation, 0, _text(exc)) from exc
        finally:
            response.release()

    async def watch(self, path: str, *, operation: str, version: str, seconds: int) -> AsyncIterator[Object | None]:
        """Yield None once the API server has begun to answer, and then the events after ``version``.

        It ends when the API server ends it, after ``seconds``.

        Raises:
            ApiError: It failed, also before the API server ends it; with the status 410, ``version`` is too old.
        """
        query: Mapping[str, str | int] = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": seconds,
        }
        # A watch that is silent for longer than the API server was to keep it has lost its other end.
        timeout = aiohttp.ClientTimeout(total=2 * seconds + 10, sock_connect=_REQUEST_SECONDS, sock_read=seconds + 5)
        response = await self._respond(_Request("GET", path, operation, query), timeout)
        try:
            yield None
            while line := await response.content.readline():
                event = _parsed(line, operation)
                if event.get("type") == "ERROR":
                    status = event.get("object", {})
                    code = status.get("code")
                    raise ApiError(operation, code if isinstance(code, int) else 500, str(status.get("message", "")))
                yield event
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as exc:
            raise ApiError(operation, 0, _text(exc)) from exc
        finally:
            _abort(response)

    async def _respond(self, request: _Request, timeout: aiohttp.ClientTimeout) -> aiohttp.ClientResponse:
        try:
            client = await self._opened()
            response: aiohttp.ClientResponse = await client.call_api(
                request.path,
                request.method,
                query_params=[*request.query.items()],
                header_params={"Accept": request.accept, "Content-Type": request.content_type},
                body=request.body,
                auth_settings=["BearerToken"],
                _preload_content=False,
                _request_timeout=timeout,
            )
        except (aiohttp.ClientError, asyncio.TimeoutError, ConfigException, OSError) as exc:
            raise ApiError(request.operation, 0, _text(exc)) from exc
        self._compare_clocks(response.headers.get("Date", ""))
        if response.status < 300:
            return response
        if response.status == 401 and not self._in_pod and time.monotonic() - self._read_at > _REREAD_SECONDS:
            self._client = None
        try:
            reason = reason_of(await response.content.read(_MAX_ERROR_BYTES))
        except (aiohttp.ClientError, asyncio.TimeoutError, OSError) as exc:
            reason = _text(exc)
        finally:
            _abort(response)
        raise ApiError(
            request.operation, response.status, reason, _retry_after(response.headers.get("Retry-After", ""))
        )

    def _compare_clocks(self, date: str) -> None:
        """Warn, now and then, if the API server tells another time: times of servers are of their own clocks."""
        now = time.monotonic()
        if now < self._warn_at:
            return
        try:
            ahead = self._wall_clock() - email.utils.parsedate_to_datetime(date).timestamp()
        except ValueError:
            return
        if abs(ahead) > _MAX_CLOCK_DIFFERENCE_SECONDS:
            self._warn_at = now + _WARNING_SECONDS
            word = "ahead of" if ahead > 0 else "behind"
            _log.warning(
                "the clock of this machine is %.0f s %s that of the API server; heartbeats may be judged wrongly: "
                "synchronise the clocks of the nodes",
                abs(ahead),
                word,
            )

    async def _opened(self) -> ApiClient:
        async with self._opening:
            if self._client is None:
                configuration = Configuration()
                # Chain, names and dates are checked; certificates of some clusters lack what RFC 5280 asks for beyond.
                configuration.disable_strict_ssl_verification = True
                self._read_at = time.monotonic()
                try:
                    await self._configure(configuration)
                    self._client = ApiClient(configuration=configuration)
                    self._clients.append(self._client)
                except (ConfigException, OSError, ValueError) as exc:
                    # Values of a kubeconfig are credentials: no text of a parser.
                    raise ApiError("read the configuration of the API server", 0, type(exc).__name__) from exc
            return self._client

    async def _configure(self, configuration: Configuration) -> None:
        if self._in_pod:
            environ = {
                "KUBERNETES_SERVICE_HOST": self._settings.host or "",
                "KUBERNETES_SERVICE_PORT": self._settings.port or "443",
            }
            files = [os.path.join(self._account, name) for name in ("token", "ca.crt", "namespace")]
            InClusterConfigLoader(files[0], files[1], environ=environ).load_and_set(configuration)
            with open(files[2], encoding="utf-8") as file:  # noqa: ASYNC230 - in memory
                self._namespace = file.read(256).strip()
            return
        loader = await load_kube_config(config_file=self._path, client_configuration=configuration)
        context = loader.current_context or {}
        self._namespace = context.get("context", {}).get("namespace") or "default"


def in_background(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Do ``work`` beside the present call, whose deadline is not its own."""
    return contextvars.Context().run(asyncio.ensure_future, work)


def _abort(response: aiohttp.ClientResponse) -> None:
    """Close the connection at once: a frozen API server would not end TLS with us."""
    connection = response.connection
    if connection is not None and connection.transport is not None:
        connection.transport.abort()
    response.close()


async def _read(response: aiohttp.ClientResponse, most_bytes: int, operation: str) -> bytes:
    data = bytearray()
    async for piece in response.content.iter_any():
        data += piece
        if len(data) > most_bytes:
            _abort(response)
            raise ApiError(operation, 413, f"an answer of more than {most_bytes >> 20} MiB")
    return bytes(data)


def _parsed(text: bytes, operation: str) -> Object:
    try:
        answer = json.loads(text)
    except ValueError as exc:
        raise ApiError(operation, 502, "an answer that is no JSON") from exc
    if not isinstance(answer, dict):
        raise ApiError(operation, 502, "an answer that is no object")
    return answer


def _retry_after(text: str) -> float:
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0.0


def _text(exc: BaseException) -> str:
    """What went wrong; errors of aiohttp name host and port, and no header."""
    return str(exc) or type(exc).__name__
