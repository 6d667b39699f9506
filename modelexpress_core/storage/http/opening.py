"""What a storage over HTTP checks of its URI when it is opened, and where its requests go."""

from __future__ import annotations

import re
from collections.abc import Collection

from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import BackendError, InvalidURIError
from modelexpress_core.storage.http.connections import ConnectionPool
from modelexpress_core.storage.http.failures import Failures, Meaning
from modelexpress_core.storage.http.requests import Origin
from modelexpress_core.uri import ModelURI

__all__ = ["check_uri", "endpoint_of"]


def check_uri(
    uri: ModelURI,
    *,
    service: str,
    place: str,
    pattern: re.Pattern[str],
    parameters: Collection[str],
    credentials_hint: str,
    name_hint: str,
) -> None:
    """Refuse a URI that the storage cannot mean.

    Args:
        uri: As the user gave it.
        service: What the user knows the storage as: ``"S3"``.
        place: What the authority names: ``"bucket"``.
        pattern: What such a name looks like.
        parameters: The query parameters that mean something.
        credentials_hint: Where credentials go instead of the URI.
        name_hint: What to write instead of a name that is none, and in place of other parameters.

    Raises:
        InvalidURIError: It holds credentials, no name, a name that none can have, or other parameters.
    """
    write = f"write {uri.scheme}://{place}/path"
    if uri.userinfo:
        raise InvalidURIError(f"credentials in the {service} URI: {uri}", hint=credentials_hint)
    if not uri.authority:
        raise InvalidURIError(
            f"no {place} in the {service} URI: {uri}", hint=f"{write}, with two slashes before the {place}"
        )
    if not pattern.fullmatch(uri.authority):
        raise InvalidURIError(f"no {place} can have the name in {uri}", hint=f"{write}; {name_hint}")
    unknown = sorted(uri.query.keys() - set(parameters))
    if unknown:
        known = " and ".join(f"?{name}=" for name in parameters) or "no parameters"
        raise InvalidURIError(
            f"unknown parameters in {uri}: {', '.join(unknown)}",
            cause=f"the query of such a URI may hold {known}; everything else is set by variables",
            hint=f"remove them; {name_hint}; write a ? in a name as %3F",
        )


def endpoint_of(origin: Origin, pool: ConnectionPool, failures: Failures, ca_bundle: str | None) -> Endpoint:
    """Where requests to ``origin`` go, as ``DiagnosableStorage.endpoint`` returns it.

    Args:
        origin: The server.
        pool: Knows the proxies.
        failures: Explains what goes wrong.
        ca_bundle: File with the authorities that the user named; None for the usual ones.

    Raises:
        BackendError: The variables that name the proxy cannot be used.
    """
    try:
        proxy = pool.proxies.for_origin(origin)
    except ValueError as exc:
        raise failures.described(Meaning(BackendError), str(exc), "", "find the proxy") from None
    return Endpoint(
        host=origin.host,
        port=origin.port,
        tls=origin.tls,
        ca_bundle=ca_bundle if origin.tls else None,
        proxy=None if proxy is None else str(proxy),
    )
