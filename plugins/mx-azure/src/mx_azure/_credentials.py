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

import certifi

from modelexpress_core.storage.http import Proxies, Token, TokenCache, retry_after_seconds
from mx_azure._errors import Attempt, TokenError
from mx_azure.settings import AzureSettings

__all__ = ["Identity", "authorities", "identity_for"]

#: What a token is asked for: the Blob services of all clouds.
_SCOPE = "https://storage.azure.com/.default"

#: Hosts of Entra ID that azure-identity knows; of others it would first ask a known one.
_KNOWN_AUTHORITIES = frozenset(
    {"https://login.microsoftonline.com", "https://login.chinacloudapi.cn", "https://login.microsoftonline.us"}
)

#: How an identity is found that no variable names.
_SEARCH = "a managed identity or a developer tool"

#: Variables of the process that azure-identity reads: of managed identities and of developer tools.
_PROCESS_VARIABLES = ("AZURE_", "IDENTITY_", "IMDS_", "MSI_")


class Identity:
    """The tokens of one identity. Thread-safe.

    Args:
        settings: Names the identity; without one, azure-identity looks for it.
        proxies: Which proxy leads to Entra ID.
        now: Seconds since the epoch.
    """

    def __init__(self, settings: AzureSettings, proxies: Proxies, now: Callable[[], float] = time.time) -> None:
        self._settings = settings
        self._proxies = proxies
        self._now = now
        self._tokens = TokenCache(self._fetch, failures=TokenError, throttled=_asked_wait, clock=now)
        self.way = _way(settings)

    def token(self) -> str:
        """A token that is valid now.

        Raises:
            TokenError: None can be had.
        """
        return self._tokens.get()

    def renew(self, refused: str) -> bool:
        """Fetch another token than ``refused``, once for all threads; whether there is one.

        Raises:
            TokenError: None can be had.
        """
        return self._tokens.renew(lambda token: token == refused)

    def describe(self) -> str:
        """Whose tokens they are, and where they come from; fetches one."""
        claims = _claims(self.token())
        names = {"appid": "application", "upn": "user", "unique_name": "user", "oid": "identity"}
        name = next((f"{word} {claims[claim]}" for claim, word in names.items() if claims.get(claim)), "identity")
        tenant = f" of the tenant {claims['tid']}" if claims.get("tid") else ""
        return f"token of the {name}{tenant}, from {self.way}"

    def _fetch(self) -> Token[str]:
        attempts: list[Attempt] = []
        try:
            # Always another credential: one keeps its token and gives it again, and repeats some refusals from memory.
            transport, credential = _new_credential(self._settings, self._proxies)
            attempts = transport.begin()
            found = credential.get_token(_SCOPE)
            if not re.fullmatch(r"[!-~]+", found.token):
                message = "a token that cannot be sent in a header"
                raise ValueError(message)  # noqa: TRY301 - handled as other failures
        except Exception as exc:  # credentials raise any exception, even of the JSON module
            raise TokenError(self.way, exc, attempts, searched=self.way == _SEARCH) from exc
        return Token(found.token, float(found.expires_on) - self._now())


def _asked_wait(failure: Exception) -> float | None:
    """The wait that a throttling service asks for; 0.0 if it names none, None if it does not throttle."""
    attempts = failure.attempts if isinstance(failure, TokenError) else ()
    answer = next((attempt for attempt in reversed(attempts) if attempt.status), None)
    if answer is None or answer.status != 429:
        return None
    return retry_after_seconds(answer.retry_after) or 0.0


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
