"""The credentials that sign requests: where they are found, and how they are renewed if S3 refuses them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import botocore.session
from botocore.config import Config
from botocore.credentials import (
    AssumeRoleProvider,
    AssumeRoleWithWebIdentityProvider,
    CanonicalNameCredentialSourcer,
    ContainerProvider,
    CredentialProvider,
    Credentials,
    EnvProvider,
    InstanceMetadataProvider,
    ProcessProvider,
    ProfileProviderBuilder,
    ReadOnlyCredentials,
    create_credential_resolver,
)
from botocore.exceptions import NoCredentialsError, PartialCredentialsError
from botocore.httpsession import get_cert_path
from botocore.utils import ContainerMetadataFetcher, InstanceMetadataFetcher, resolve_imds_endpoint_mode

from modelexpress_core.storage.http import Proxies, Token, TokenCache
from mx_s3._errors import RENEWED, CredentialsError, wants_other_credentials
from mx_s3._programs import program_starter
from mx_s3._sending import CredentialSession
from mx_s3.settings import S3Settings

__all__ = ["RENEWAL_TRIED", "Identity", "new_session"]

#: Key in the context of a request: other credentials were already tried.
RENEWAL_TRIED = "mx_renewed"

#: botocore's name of a source of credentials -> description.
_SOURCE_DESCRIPTIONS: Mapping[str, str] = {
    "explicit": "from AWS_ACCESS_KEY_ID",
    "env": "from AWS_ACCESS_KEY_ID",
    "assume-role": "of the role in {profile}",
    "assume-role-with-web-identity": "of a role assumed with a web identity token",
    "sso": "from the single sign-on of {profile}",
    "login": "from the login of {profile}",
    "shared-credentials-file": "from {profile} in the credentials file",
    "config-file": "from {profile} in the config file",
    "custom-process": "from the program in {profile}",
    "container-role": "of the role of this container",
    "iam-role": "of the role of this machine, from the instance metadata service",
}

#: Sources that are files: reading them again costs no request.
_FILES = frozenset({"shared-credentials-file", "config-file"})

#: How long the program of a profile may run, in read timeouts.
_PROGRAM_TIMEOUTS = 2

#: Sources that cannot change while the process runs.
_FIXED = frozenset({"explicit", "env"})


class _Session(botocore.session.Session):
    """A session that applies the settings to clients of services other than S3 (STS, SSO)."""

    settings = S3Settings()

    def create_client(self, service_name: str, *args: Any, **options: Any) -> Any:  # noqa: ANN401 - as botocore's
        if service_name != "s3":
            config = Config(
                connect_timeout=self.settings.connect_timeout_seconds,
                read_timeout=self.settings.read_timeout_seconds,
                retries={"total_max_attempts": 1, "mode": "standard"},  # core retries
            )
            options["config"] = config.merge(options["config"]) if options.get("config") else config
        if service_name == "sts":
            general = None if os.environ.get("AWS_ENDPOINT_URL_STS") else self.settings.endpoint
            options["endpoint_url"] = options.get("endpoint_url") or self.settings.sts_endpoint or general
        client = super().create_client(service_name, *args, **options)
        if service_name != "s3":
            sending = CredentialSession(
                connect_timeout_seconds=self.settings.connect_timeout_seconds,
                read_timeout_seconds=self.settings.read_timeout_seconds,
                proxies=Proxies.from_environ({}, os.environ),
                ca_bundle=self.ca_bundle,
            )
            send: Any = sending.send  # the stubs have it that handlers return nothing
            client.meta.events.register("before-send", send)
        return client

    def ca_bundle(self) -> str | None:
        """Return the file with the authorities to trust."""
        named = self.get_config_variable("ca_bundle") or os.environ.get("REQUESTS_CA_BUNDLE")
        found: str | None = named or get_cert_path(verify=True)
        return found


@cache
def _descriptions() -> Any:  # noqa: ANN401 - botocore has no annotations
    """Return botocore's descriptions of services; cached, since reading them takes a tenth of a second."""
    return botocore.session.Session().get_component("data_loader")


def new_session(settings: S3Settings) -> _Session:
    """Return a new session, for which ``settings`` override the process's environment."""
    session = _Session(profile=settings.profile)
    session.settings = settings
    descriptions = _descriptions()
    # Every session of boto3 adds its directory again.
    descriptions.search_paths[:] = dict.fromkeys(descriptions.search_paths)
    session.register_component("data_loader", descriptions)
    variables = {
        "ca_bundle": settings.ca_bundle,
        "config_file": settings.config_file,
        "credentials_file": settings.credentials_file,
        "ec2_metadata_service_endpoint": settings.metadata_endpoint,
    }
    for name, value in variables.items():
        if value is not None:
            session.set_config_variable(name, value)
    return session


class Identity:
    """The credentials of a client, found at first use. Has the interface of botocore's credentials.

    Args:
        settings: Settings that override the process's environment.
        region: Region of the STS endpoint.
    """

    def __init__(self, settings: S3Settings, region: str) -> None:
        if (settings.access_key_id is None) != (settings.secret_access_key is None):
            missing = "AWS_SECRET_ACCESS_KEY" if settings.secret_access_key is None else "AWS_ACCESS_KEY_ID"
            raise PartialCredentialsError(provider="explicit", cred_var=missing)
        self._settings = settings
        self._region = region
        self._credentials = TokenCache(self._fetch, failures=CredentialsError)
        self._last = threading.local()

    # -- botocore's interface of credentials --------------------------------------------------------------------------

    method = "mx-s3"

    def load_credentials(self) -> Identity:
        """Return itself, so that it can also replace a session's resolver, without a search yet."""
        return self

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        """Return the current credentials; botocore refreshes credentials that are about to expire."""
        frozen = self._last.signed_with = _frozen(self._credentials.get())
        return frozen

    def get_deferred_property(self, property_name: str) -> Callable[[], Any]:
        """Return a function that returns the property."""
        return lambda: getattr(self.get_frozen_credentials(), property_name, None)

    # -- renewal ------------------------------------------------------------------------------------------------------

    def watch(self, client: Any) -> None:  # noqa: ANN401 - botocore's clients are made at run time
        """Repeat a request of ``client`` once, at once, if S3 refused its credentials and new ones are found.

        This is not left to the retries of core, because waiting does not help, and the read itself has not failed.
        """
        client.meta.events.register_last("request-created.s3", self._remember)
        client.meta.events.register("needs-retry.s3", self._repeat)

    def _remember(self, request: Any, **_: object) -> None:  # noqa: ANN401 - an AWSRequest
        signed_with = getattr(self._last, "signed_with", None)
        request.context["mx_signed_with"] = hash(signed_with)

    def _repeat(self, response: Any, request_dict: Any, **_: object) -> int | None:  # noqa: ANN401 - as botocore's
        """Return 0, the seconds to wait, if the request must be signed and sent again; None otherwise."""
        found = self._credentials.held
        if response is None or found is None:
            return None
        http, parsed = response
        context = request_dict["context"]
        redirected = bool(context.get("s3_redirect", {}).get("redirected"))
        if redirected and not context.get("mx_redirected"):
            context["mx_redirected"] = True  # botocore sends it again, to another region
            return None
        code = str(parsed.get("Error", {}).get("Code", ""))
        if not wants_other_credentials(code, http.status_code, free=found.method in _FILES):
            return None
        if RENEWAL_TRIED not in context and self._renew(context.get("mx_signed_with")):
            context[RENEWAL_TRIED] = True
            return 0
        if found.method not in _FIXED:
            parsed["Error"][RENEWED] = RENEWAL_TRIED in context
        return None

    def _renew(self, refused: int | None) -> bool:
        """Search for credentials, once for all threads; return whether they differ from the ``refused`` ones."""
        return self._credentials.renew(
            lambda found: hash(_frozen(found)) == refused,
            is_final=lambda found: found.method not in _FILES,  # a file may change at any time
        )

    # -- search -------------------------------------------------------------------------------------------------------

    def describe(self) -> str:
        """Return the end of the access key, and where it was found."""
        key = self.get_frozen_credentials().access_key or ""
        found = self._credentials.held
        method = found.method if found is not None else ""
        profile = f"the profile {self._settings.profile or 'default'}"
        source = _SOURCE_DESCRIPTIONS.get(method, f"by {method}").format(profile=profile)
        return f"access key ...{key[-4:]}, {source} ({method})"

    def _fetch(self) -> Token[Credentials]:
        """Search for credentials, and fetch what they need; botocore renews them before they end."""
        found = self._find()
        _frozen(found)
        return Token(found)

    def _find(self) -> Credentials:
        """Return credentials of the first source that has any, without using cached ones."""
        settings = self._settings
        if settings.access_key_id is not None and settings.secret_access_key is not None:
            return Credentials(settings.access_key_id, settings.secret_access_key, settings.session_token)
        try:
            chain = _Chain(settings, self._region)
            found: Credentials | None = chain.resolver.load_credentials()
        except Exception as exc:  # providers raise any exception, even KeyError
            raise CredentialsError(error=exc) from exc
        if found is None:
            raise CredentialsError(error=NoCredentialsError(), metadata=chain.metadata_url)
        return found


def _frozen(found: Credentials) -> ReadOnlyCredentials:
    try:
        return found.get_frozen_credentials()
    except Exception as exc:  # as in Identity._find
        raise CredentialsError(error=exc) from exc


class _BoundedMetadataFetcher(InstanceMetadataFetcher):
    """Asks the instance metadata service. botocore's class makes its own session, which reads answers of any size."""

    def __init__(self, *, timeout: int, **options: Any) -> None:  # noqa: ANN401 - as botocore's
        super().__init__(timeout=timeout, **options)
        self._session = CredentialSession(
            connect_timeout_seconds=timeout, read_timeout_seconds=timeout, proxies=Proxies.from_environ({}, os.environ)
        )


class _ProfileProviders(ProfileProviderBuilder):
    """Builds botocore's providers of one profile, whose program runs for a bounded time."""

    def __init__(self, session: _Session, region: str) -> None:
        super().__init__(session, cache={}, region_name=region)
        self._load_config = lambda: session.full_config
        self._start = program_starter(_PROGRAM_TIMEOUTS * session.settings.read_timeout_seconds)

    def program(self, profile_name: str) -> ProcessProvider:
        """Return the provider that runs the program of the profile."""
        return ProcessProvider(profile_name, self._load_config, self._start)

    def providers(self, profile_name: str, disable_env_vars: bool = False) -> list[Any]:
        """Return the providers of a profile that a role is assumed from."""
        found: list[Any] = super().providers(profile_name, disable_env_vars)
        return [self.program(profile_name) if provider.METHOD == "custom-process" else provider for provider in found]


class _Chain:
    """botocore's chain of credential providers, with settings that override the environment, and bounded answers."""

    def __init__(self, settings: S3Settings, region: str) -> None:
        session = new_session(settings)
        environ = _environ(settings)
        metadata = _BoundedMetadataFetcher(
            timeout=session.get_config_variable("metadata_service_timeout"),
            num_attempts=session.get_config_variable("metadata_service_num_attempts"),
            env=environ,
            user_agent=session.user_agent(),
            config={
                "ec2_metadata_service_endpoint": session.get_config_variable("ec2_metadata_service_endpoint"),
                "ec2_metadata_service_endpoint_mode": resolve_imds_endpoint_mode(session),
                "ec2_metadata_v1_disabled": session.get_config_variable("ec2_metadata_v1_disabled"),
            },
        )
        disabled = environ.get("AWS_EC2_METADATA_DISABLED", "").lower() == "true"
        #: URL of the instance metadata service; None if it is disabled.
        self.metadata_url = None if disabled else metadata.get_base_url()
        agent: Any = ContainerMetadataFetcher(
            session=CredentialSession(
                connect_timeout_seconds=ContainerMetadataFetcher.TIMEOUT_SECONDS,
                read_timeout_seconds=ContainerMetadataFetcher.TIMEOUT_SECONDS,
            ),
            sleep=lambda _seconds: None,  # core waits between attempts
        )
        container, machine = ContainerProvider(environ, agent), InstanceMetadataProvider(metadata)
        profile = session.get_config_variable("profile") or "default"
        profiles = _ProfileProviders(session, region)
        replaced: dict[str | None, CredentialProvider] = {
            "assume-role": AssumeRoleProvider(
                load_config=lambda: session.full_config,
                client_creator=_client_creator(session, region),
                cache={},
                profile_name=profile,
                credential_sourcer=CanonicalNameCredentialSourcer([EnvProvider(), container, machine]),
                profile_provider_builder=profiles,
            ),
            "custom-process": profiles.program(profile),
            "container-role": container,
            "iam-role": machine,
        }
        self.resolver = create_credential_resolver(session, region_name=region)
        providers: list[Any] = []
        for provider in self.resolver.providers:
            if provider.METHOD == "assume-role-with-web-identity" and settings.web_identity_token_file is not None:
                providers.append(_web_identity(session, environ, region))
            providers.append(replaced.get(provider.METHOD, provider))
        self.resolver.providers = providers


def _client_creator(session: _Session, region: str) -> Callable[..., Any]:
    """Return a function that makes a client of a service, in the region if the caller names no other."""
    return lambda service, **options: session.create_client(service, **{"region_name": region, **options})


def _environ(settings: S3Settings) -> dict[str, str]:
    """Return the process's environment, overridden by the settings that botocore reads only from variables."""
    container = {
        "AWS_CONTAINER_CREDENTIALS_FULL_URI": settings.container_credentials_full_uri,
        "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI": settings.container_credentials_relative_uri,
        "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": settings.container_authorization_token_file,
        "AWS_CONTAINER_AUTHORIZATION_TOKEN": settings.container_authorization_token,
    }
    disabled = settings.metadata_disabled
    others = {
        "AWS_WEB_IDENTITY_TOKEN_FILE": settings.web_identity_token_file,
        "AWS_ROLE_ARN": settings.role_arn,
        "AWS_ROLE_SESSION_NAME": settings.role_session_name,
        "AWS_EC2_METADATA_DISABLED": None if disabled is None else str(disabled).lower(),
    }
    # A container's variables are alternatives: if the settings have one, all of the process's are dropped.
    replaced = container.keys() if any(container.values()) else ()
    process = {name: value for name, value in os.environ.items() if name not in replaced}
    return process | {name: value for name, value in {**container, **others}.items() if value is not None}


def _web_identity(session: _Session, environ: Mapping[str, str], region: str) -> Any:  # noqa: ANN401
    """Return the provider that takes the token file and the role from ``environ``, passed to it as a profile."""
    names = {
        "web_identity_token_file": "AWS_WEB_IDENTITY_TOKEN_FILE",
        "role_arn": "AWS_ROLE_ARN",
        "role_session_name": "AWS_ROLE_SESSION_NAME",
    }
    profile = {key: environ[name] for key, name in names.items() if environ.get(name)}
    return AssumeRoleWithWebIdentityProvider(
        load_config=lambda: {"profiles": {"variables": profile}},
        client_creator=_client_creator(session, region),
        profile_name="variables",
        cache={},
        disable_env_vars=True,
    )
