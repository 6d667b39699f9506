"""The credentials of requests: where they are found, and how access tokens are fetched and renewed."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from attrs import field, frozen
from google.auth.credentials import Credentials

from modelexpress_core.storage.http import Request, Token, TokenCache, retry_after_seconds
from mx_gcs._errors import (
    CredentialsError,
    CredentialsFileError,
    MetadataAnswerError,
    NoCredentialsError,
    StaleTokenError,
    UniverseError,
)
from mx_gcs._tokens import METADATA_HOST, TokenAnswerError, TokenRequests
from mx_gcs.settings import GcsSettings

__all__ = ["Identity"]

#: What a token is asked for: reading objects, and nothing else.
_SCOPES = ("https://www.googleapis.com/auth/devstorage.read_only",)

#: Files with credentials take a few KiB.
_MAX_FILE_BYTES = 1 << 20

#: Where gcloud keeps the login of ``gcloud auth application-default login``.
_LOGIN_FILE = "application_default_credentials.json"

#: In requests to a metadata server, and in its answers.
_FLAVOR = "Metadata-Flavor"

#: A service account, or the workload identity pool of a cluster ("project.svc.id.goog").
_ACCOUNT = re.compile(r"[A-Za-z0-9._@:/-]{1,256}")

#: What names the machine on Google's own.
_PRODUCT_NAME = Path("/sys/class/dmi/id/product_name")


class MetadataCredentials(Credentials):
    """The service account of this machine or pod, from the metadata server (Compute Engine, GKE, Cloud Run).

    google-auth has a class for it, which reads its variables at import, retries and sleeps by itself, and needs
    ``requests``.

    Args:
        host: Host, or host and port, of the metadata server.
    """

    def __init__(self, host: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # google-auth has few annotations
        self._host = host

    def refresh(self, request: TokenRequests) -> None:
        """Fetch a token.

        Raises:
            TokenAnswerError: The server refused.
            MetadataAnswerError: It is not a metadata server, or its answer holds no token.
            OSError: There is no answer.
        """
        answer = json.loads(self._get(request, "token"))
        try:
            token, lifetime = answer["access_token"], float(answer["expires_in"])
        except (TypeError, KeyError, ValueError):
            raise MetadataAnswerError from None
        if not isinstance(token, str):
            raise MetadataAnswerError
        self.token = token
        # google-auth compares it with a time of UTC without a zone.
        self.expiry = _now().replace(tzinfo=None) + timedelta(seconds=lifetime)

    def email(self, request: TokenRequests) -> str:
        """The service account's email address, or what a pod has in its place; takes a request."""
        text = self._get(request, "email").strip()
        if not _ACCOUNT.fullmatch(text):
            raise MetadataAnswerError
        return text

    def _get(self, request: TokenRequests, name: str) -> str:
        url = f"http://{self._host}/computeMetadata/v1/instance/service-accounts/default/{name}"
        try:
            answer = request(url, headers={_FLAVOR: "Google"})
        except TokenAnswerError as exc:
            _check_flavor(exc.headers)
            raise
        _check_flavor(answer.headers)
        return answer.data.decode("utf-8", "replace")


def _check_flavor(headers: Mapping[str, str]) -> None:
    """Refuse what is not from a metadata server of Google: other clouds have one at the same address."""
    if headers.get(_FLAVOR.lower()) != "Google":
        raise MetadataAnswerError


@frozen
class _Source:
    """Credentials, and where they were found.

    Attributes:
        credentials: They fetch tokens.
        description: For people: whose they are, and where they were found.
    """

    credentials: Any = field(repr=False)
    description: str


@frozen(eq=False)
class _Access:
    """What a token gives.

    Attributes:
        source: Where it is from.
        headers: What a request with it has.
    """

    source: _Source
    headers: tuple[tuple[str, str], ...] = field(repr=False)

    @property
    def authorization(self) -> str:
        """The header with the token."""
        return dict(self.headers).get("Authorization", "")


class Identity:
    """The credentials of one storage, found and fetched at first use. Thread-safe.

    Args:
        settings: Where credentials are.
        requests: Sends the requests for tokens; closed with this.
        clock: Seconds; says when a token is renewed early.
    """

    def __init__(
        self, settings: GcsSettings, requests: TokenRequests, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._settings = settings
        self._requests = requests
        self._metadata_host = settings.metadata_host or METADATA_HOST
        self._tokens = TokenCache(self._fetch, failures=CredentialsError, throttled=_asked_wait, clock=clock)

    def headers(self) -> tuple[tuple[str, str], ...]:
        """The headers of a request: the access token, and the project that the credentials name.

        Raises:
            CredentialsError: There are no credentials, or no token can be fetched.
        """
        return self._tokens.get().headers

    def renew(self, authorization: str) -> bool:
        """Fetch a token after GCS refused one, once for all threads.

        Args:
            authorization: The header with the refused token.

        Returns:
            Whether there is another one now.

        Raises:
            CredentialsError: No token can be fetched.
        """
        return self._tokens.renew(lambda access: access.authorization == authorization)

    def describe(self) -> str:
        """Whose credentials they are, and where they were found; fetches a token.

        Raises:
            CredentialsError: There are no credentials, or no token can be fetched.
        """
        return self._tokens.get().source.description

    def close(self) -> None:
        """End what other threads wait for."""
        self._requests.close()

    def _fetch(self) -> Token[_Access]:
        """Find the credentials anew, since a file may have changed, and fetch a token."""
        place = ""
        try:
            source = self._find()
            place = source.description
            source.credentials.refresh(self._requests)
            headers: dict[str, str] = {}
            source.credentials.apply(headers)
            access = _Access(source, tuple((name.title(), value) for name, value in headers.items()))
            Request.to_url("GET", self._settings.base_url, access.headers)  # refuses a token that is no header
            lifetime = _lifetime_seconds(source.credentials.expiry)
            if lifetime <= 0:
                raise StaleTokenError  # noqa: TRY301 - explained like all other failures
        except Exception as exc:  # noqa: BLE001 - google-auth raises exceptions of its own, and many of Python's
            # Those of google-auth may hold what a service answered, and with it tokens.
            raise CredentialsError(exc, place) from (exc if isinstance(exc, OSError) else None)
        return Token(access, lifetime)

    # -- search -------------------------------------------------------------------------------------------------------

    def _find(self) -> _Source:
        source = self._found()
        targets = self._settings.impersonated
        if not targets:
            return source
        from google.auth import impersonated_credentials

        acting = impersonated_credentials.Credentials(
            source_credentials=source.credentials,
            target_principal=targets[-1],
            target_scopes=list(_SCOPES),
            delegates=list(targets[:-1]),
        )
        return _Source(acting, f"service account {targets[-1]}, impersonated with: {source.description}")

    def _found(self) -> _Source:
        """The first that there is, as https://cloud.google.com/docs/authentication/application-default-credentials."""
        settings = self._settings
        if settings.credentials_file is not None:
            return self._of_file(Path(settings.credentials_file), "GOOGLE_APPLICATION_CREDENTIALS")
        directory = settings.config_directory
        login = Path(directory or "~/.config/gcloud").expanduser() / _LOGIN_FILE
        if login.is_file():
            return self._of_file(login, "the login of gcloud")
        if settings.metadata_disabled:
            raise NoCredentialsError("", expected=False)
        return self._of_metadata()

    def _of_metadata(self) -> _Source:
        host = self._metadata_host
        credentials = MetadataCredentials(host)
        try:
            email = credentials.email(self._requests)
        except OSError as exc:
            raise NoCredentialsError(host, expected=self._expects_metadata()) from exc
        except MetadataAnswerError as exc:
            if self._settings.metadata_host is not None:
                raise
            raise NoCredentialsError(host, expected=False) from exc
        except TokenAnswerError as exc:
            if exc.status == 404:
                raise
            email = "of unknown name"
        return _Source(credentials, f"service account {email}, from the metadata server {host}")

    def _expects_metadata(self) -> bool:
        """Whether this machine should have a metadata server; that of a new pod begins after the pod itself."""
        if self._settings.metadata_host is not None:
            return True
        try:
            return _PRODUCT_NAME.read_text(encoding="utf-8").startswith("Google")
        except (OSError, ValueError):
            return False

    def _of_file(self, path: Path, origin: str) -> _Source:
        info = _json_of(path)
        kind = str(info.get("type"))
        load = _LOADERS.get(kind)
        if load is None:
            raise CredentialsFileError(str(path), f"its type, {kind[:40]!r}, is none of: {', '.join(_LOADERS)}")
        try:
            credentials, whose = load(info)
        except Exception:  # noqa: BLE001 - a key that cannot be parsed raises any exception
            raise CredentialsFileError(str(path), f"it is no usable {kind}") from None
        domain = getattr(credentials, "universe_domain", self._settings.universe_domain)
        if domain != self._settings.universe_domain:
            raise UniverseError(str(domain), self._settings.universe_domain)
        return _Source(credentials, f"{whose}, in {path} ({origin})")


def _json_of(path: Path) -> Mapping[str, Any]:
    with path.open("rb") as file:
        content = file.read(_MAX_FILE_BYTES + 1)
    try:
        info = json.loads(content) if len(content) <= _MAX_FILE_BYTES else None
    except (ValueError, RecursionError):
        info = None
    if not isinstance(info, dict):
        raise CredentialsFileError(str(path), "it holds no JSON object")
    return info


def _lifetime_seconds(expiry: datetime | None) -> float:
    """How long a token is valid that ends at ``expiry``, which google-auth has in UTC without a zone."""
    return math.inf if expiry is None else (expiry.replace(tzinfo=timezone.utc) - _now()).total_seconds()


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _asked_wait(failure: Exception) -> float | None:
    """The wait that a throttling service asks for; 0.0 if it names none, None if it does not throttle."""
    answer = failure.error if isinstance(failure, CredentialsError) else None
    if not isinstance(answer, TokenAnswerError) or answer.status != 429:
        return None
    return retry_after_seconds(answer.headers.get("retry-after")) or 0.0


# -- the kinds of files ------------------------------------------------------------------------------------------------

# Each kind of google-auth takes some tens of milliseconds to import, so that only the one that is needed is.

_Loaded = tuple[Any, str]


def _of_service_account(info: Mapping[str, Any]) -> _Loaded:
    from google.oauth2 import service_account

    loaded = service_account.Credentials.from_service_account_info(info, scopes=_SCOPES)
    return loaded, f"service account {loaded.service_account_email}"


def _of_user(info: Mapping[str, Any]) -> _Loaded:
    from google.oauth2 import credentials

    # Without scopes: a login has those that the user agreed to.
    return credentials.Credentials.from_authorized_user_info(info), "login of a user"


def _of_external_account(info: Mapping[str, Any]) -> _Loaded:
    from google.auth import aws, identity_pool, pluggable

    kind: Any
    if info.get("subject_token_type") == "urn:ietf:params:aws:token-type:aws4_request":
        kind = aws.Credentials
    elif "executable" in (info.get("credential_source") or {}):
        kind = pluggable.Credentials
    else:
        kind = identity_pool.Credentials
    loaded = kind.from_info(info, scopes=_SCOPES)
    return loaded, f"external account {loaded.service_account_email or info['audience']}"


def _of_workforce(info: Mapping[str, Any]) -> _Loaded:
    from google.auth import external_account_authorized_user

    return external_account_authorized_user.Credentials.from_info(info), "login of a user of a workforce pool"


def _of_impersonated(info: Mapping[str, Any]) -> _Loaded:
    from google.auth import impersonated_credentials

    loaded = impersonated_credentials.Credentials.from_impersonated_service_account_info(info, scopes=_SCOPES)
    return loaded, f"service account {loaded.service_account_email}, impersonated"


_LOADERS: Mapping[str, Callable[[Mapping[str, Any]], _Loaded]] = {
    "service_account": _of_service_account,
    "authorized_user": _of_user,
    "external_account": _of_external_account,
    "external_account_authorized_user": _of_workforce,
    "impersonated_service_account": _of_impersonated,
}
