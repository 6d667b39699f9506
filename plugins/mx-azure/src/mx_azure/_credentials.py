"""Bearer tokens of Microsoft Entra ID: fetched once for all reads of the process, and renewed before they run out."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import attrs
import certifi
from attrs import field, frozen

from modelexpress_core.storage.http import Proxies, retry_after_seconds
from mx_azure._errors import Attempt, TokenError
from mx_azure.settings import AzureSettings

__all__ = ["Identity", "authorities", "identity_for"]

#: What a token is asked for: the Blob services of all clouds.
_SCOPE = "https://storage.azure.com/.default"

#: A token is renewed this long before its end, or at the time that Entra ID recommends.
_RENEWAL_SECONDS = 300.0

#: How long a token that is still valid is used after it could not be renewed, until the next try.
_RENEWAL_PAUSE_SECONDS = 30.0

#: A token that ends sooner is not used any more.
_MIN_LIFETIME_SECONDS = 30.0

#: After an answer 429, how long the service is left alone if it does not say; doubled with each such answer.
_FIRST_BACKOFF_SECONDS = 1.0
_MAX_BACKOFF_SECONDS = 60.0

#: Hosts of Entra ID that azure-identity knows; of others it would first ask a known one.
_KNOWN_AUTHORITIES = frozenset(
    {"https://login.microsoftonline.com", "https://login.chinacloudapi.cn", "https://login.microsoftonline.us"}
)

#: How an identity is found that no variable names.
_SEARCH = "a managed identity or a developer tool"

#: Variables of the process that azure-identity reads: of managed identities and of developer tools.
_PROCESS_VARIABLES = ("AZURE_", "IDENTITY_", "IMDS_", "MSI_")


@frozen
class _Token:
    """A bearer token.

    Attributes:
        text: The token.
        renew_at: Seconds since the epoch after which another one is fetched.
        ends_at: Seconds since the epoch.
    """

    text: str = field(repr=False)
    renew_at: float
    ends_at: float


class Identity:
    """The tokens of one identity. Thread-safe: one thread asks for all, and the others use the old token meanwhile.

    Args:
        settings: Names the identity; without one, azure-identity looks for it.
        proxies: Which proxy leads to Entra ID.
        now: Seconds since the epoch.
    """

    def __init__(self, settings: AzureSettings, proxies: Proxies, now: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._proxies = proxies
        self._now = now
        self._lock = threading.Lock()
        self._transport: Any = None
        self._credential: Any = None
        self._token: _Token | None = None
        self._asked = 0
        self._failure: TokenError | None = None
        self._throttled_times = 0
        self._throttled_until = 0.0
        self.way = _way(settings)

    def token(self) -> str:
        """A token that is valid now.

        Raises:
            TokenError: None can be had.
        """
        token, now = self._token, self._now()
        if token is not None and now < token.renew_at:
            return token.text
        usable = token if token is not None and now + _MIN_LIFETIME_SECONDS < token.ends_at else None
        asked = self._asked
        if not self._lock.acquire(blocking=usable is None) and usable is not None:
            return usable.text
        try:
            if self._token is not token and self._token is not None:  # another thread has fetched it
                return self._token.text
            try:
                self._raise_failure_since(asked)
                return self._fetch().text
            except TokenError:
                if usable is None:
                    raise
                self._token = attrs.evolve(usable, renew_at=now + _RENEWAL_PAUSE_SECONDS)
                return usable.text
        finally:
            self._lock.release()

    def renew(self, refused: str) -> bool:
        """Fetch another token than ``refused``, once for all threads; whether there is one.

        Raises:
            TokenError: None can be had.
        """
        asked = self._asked
        with self._lock:
            if self._token is not None and self._token.text != refused:
                return True
            self._raise_failure_since(asked)
            return self._fetch().text != refused

    def describe(self) -> str:
        """Whose tokens they are, and where they come from; fetches one."""
        claims = _claims(self.token())
        names = {"appid": "application", "upn": "user", "unique_name": "user", "oid": "identity"}
        name = next((f"{word} {claims[claim]}" for claim, word in names.items() if claims.get(claim)), "identity")
        tenant = f" of the tenant {claims['tid']}" if claims.get("tid") else ""
        return f"token of the {name}{tenant}, from {self.way}"

    def _raise_failure_since(self, asked: int) -> None:
        """Raise the last failure again if another thread has just asked in vain, or until the service may be asked."""
        failure = self._failure
        if failure is not None and (self._asked != asked or self._now() < self._throttled_until):
            raise TokenError(failure.way, failure.error, failure.attempts, searched=failure.searched) from failure

    def _fetch(self) -> _Token:
        """Fetch a token; the lock is held."""
        attempts: list[Attempt] = []
        try:
            if self._credential is None or self._token is not None:  # one keeps its token, and would give it again
                self._transport, self._credential = _new_credential(self._settings, self._proxies)
            attempts = self._transport.begin()
            found = self._credential.get_token(_SCOPE)
            if not re.fullmatch(r"[!-~]+", found.token):
                message = "a token that cannot be sent in a header"
                raise ValueError(message)  # noqa: TRY301 - handled as other failures
        except Exception as exc:  # credentials raise any exception, even of the JSON module
            self._credential = None  # one repeats some refusals from its memory, without another request
            self._failure = TokenError(self.way, exc, attempts, searched=self.way == _SEARCH)
            self._note_throttling(attempts)
            raise self._failure from exc
        finally:
            self._asked += 1
        self._failure, self._throttled_times = None, 0
        ends_at = float(found.expires_on)
        lifetime = ends_at - self._now()
        self._token = _Token(found.token, ends_at - min(_RENEWAL_SECONDS, lifetime / 2), ends_at)
        return self._token

    def _note_throttling(self, attempts: list[Attempt]) -> None:
        answer = next((attempt for attempt in reversed(attempts) if attempt.status), None)
        if answer is None or answer.status != 429:
            return
        backoff = _FIRST_BACKOFF_SECONDS * 2.0**self._throttled_times
        asked_for = retry_after_seconds(answer.retry_after)
        self._throttled_times += 1
        self._throttled_until = self._now() + min(asked_for or backoff, _MAX_BACKOFF_SECONDS)


_identities: dict[object, Identity] = {}
_identities_lock = threading.Lock()


def identity_for(settings: AzureSettings, environ: Mapping[str, str]) -> Identity:
    """The identity that the variables name: one object per process, so that all loads share its tokens."""
    proxies = Proxies.from_environ(environ, os.environ)
    process = tuple(sorted(pair for pair in os.environ.items() if pair[0].startswith(_PROCESS_VARIABLES)))
    tokens = (
        settings.tenant_id,
        settings.client_id,
        settings.client_secret,
        settings.client_certificate,
        settings.certificate_password,
        settings.federated_token_file,
        settings.authority,
        settings.ca_bundle,
        settings.connect_timeout_seconds,
        settings.read_timeout_seconds,
    )
    key = (tokens, tuple(sorted(proxies.by_scheme.items())), proxies.exceptions, process)
    with _identities_lock:
        if key not in _identities:
            _identities[key] = Identity(settings, proxies)
        return _identities[key]


def authorities(settings: AzureSettings) -> str:
    """The file with the authorities to trust."""
    return settings.ca_bundle or certifi.where()


def _way(settings: AzureSettings) -> str:
    if settings.client_secret is not None:
        return "the service principal of AZURE_CLIENT_ID and AZURE_CLIENT_SECRET"
    if settings.client_certificate is not None:
        return "the service principal of AZURE_CLIENT_ID and AZURE_CLIENT_CERTIFICATE_PATH"
    if settings.federated_token_file is not None:
        return "the workload identity of AZURE_FEDERATED_TOKEN_FILE"
    return _SEARCH


def _new_credential(settings: AzureSettings, proxies: Proxies) -> tuple[Any, Any]:
    """The transport, and azure-identity's credential over it."""
    from azure import identity

    from mx_azure._sending import BoundedTransport

    logger = logging.getLogger("azure.identity")
    if logger.level == logging.NOTSET:  # its warnings repeat what our errors say, and more of the answers
        logger.setLevel(logging.ERROR)
    transport = BoundedTransport(
        connect_timeout_seconds=settings.connect_timeout_seconds,
        read_timeout_seconds=settings.read_timeout_seconds,
        proxies=proxies,
        ca_bundle=authorities(settings),
    )
    options: dict[str, Any] = {"transport": transport, "retry_total": 0}  # core retries
    if settings.authority is not None:
        options["authority"] = settings.authority
        options["disable_instance_discovery"] = settings.authority not in _KNOWN_AUTHORITIES
    principal = {"tenant_id": settings.tenant_id, "client_id": settings.client_id}
    credential: Any
    if settings.client_secret is not None:
        credential = identity.ClientSecretCredential(client_secret=settings.client_secret, **principal, **options)  # type: ignore[arg-type]  # azure-identity names what is missing
    elif settings.client_certificate is not None:
        credential = identity.CertificateCredential(
            certificate_path=settings.client_certificate,
            password=settings.certificate_password,
            **principal,  # type: ignore[arg-type]  # as above
            **options,
        )
    elif settings.federated_token_file is not None:
        credential = identity.WorkloadIdentityCredential(
            token_file_path=settings.federated_token_file, **principal, **options
        )
    else:
        credential = identity.DefaultAzureCredential(
            exclude_environment_credential=True,
            exclude_workload_identity_credential=True,
            exclude_shared_token_cache_credential=True,
            managed_identity_client_id=settings.client_id,
            **options,
        )
    return transport, credential


def _claims(token: str) -> Mapping[str, Any]:
    """What a token says of itself, unverified: for messages only."""
    try:
        payload = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
    except (ValueError, IndexError):
        return {}
    return {
        name: value
        for name, value in (claims.items() if isinstance(claims, dict) else ())
        if isinstance(value, str) and value.isprintable() and len(value) < 100
    }
