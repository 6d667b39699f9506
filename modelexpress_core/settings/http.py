"""Settings that each storage over HTTP has: time-outs, trusted authorities and URLs of servers.

A settings class declares them with one line each, so that names, defaults and texts are the same for every storage::

    @frozen
    class WebSettings:
        endpoint: str | None = env(
            "MX_WEB_ENDPOINT", default=None, converter=http_url("https://example.com"), help="..."
        )
        ca_bundle: str | None = ca_bundle("MX_WEB_CA_BUNDLE")
        connect_timeout_seconds: float = connect_timeout("MX_WEB")
        read_timeout_seconds: float = read_timeout("MX_WEB")
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from modelexpress_core.errors import SettingsError
from modelexpress_core.settings.converters import boolean, seconds
from modelexpress_core.settings.declaring import env

__all__ = [
    "anonymous",
    "ca_bundle",
    "connect_timeout",
    "http_url",
    "is_http_url",
    "read_timeout",
    "refuse_credentials_in_urls",
]


def connect_timeout(prefix: str) -> Any:  # noqa: ANN401 - as ``env``
    """Declare ``<prefix>_CONNECT_TIMEOUT_SECONDS``: of each step to a connection."""
    return env(
        f"{prefix}_CONNECT_TIMEOUT_SECONDS",
        default=10.0,
        converter=seconds,
        help="How long to wait for a connection.",
    )


def read_timeout(prefix: str) -> Any:  # noqa: ANN401 - as ``env``
    """Declare ``<prefix>_READ_TIMEOUT_SECONDS``: of the head of an answer, and of the next bytes of its content."""
    return env(
        f"{prefix}_READ_TIMEOUT_SECONDS",
        default=30.0,
        converter=seconds,
        help="How long to wait for the next bytes.",
    )


def ca_bundle(name: str, *aliases: str, unset: str = "") -> Any:  # noqa: ANN401 - as ``env``
    """Declare the variable that names the file with the trusted authorities.

    Args:
        name: The variable.
        *aliases: As for ``env``.
        unset: Which authorities are trusted without the variable; empty to leave it out of the reference.
    """
    text = "File with the trusted certificate authorities"
    return env(name, *aliases, default=None, help=f"{text}; unset: {unset}." if unset else f"{text}.")


def anonymous(prefix: str, how: str, what: str) -> Any:  # noqa: ANN401 - as ``env``
    """Declare ``<prefix>_ANONYMOUS``.

    Args:
        prefix: Of the variable.
        how: How requests are sent: ``"without credentials"``.
        what: What can be read so: ``"buckets"``.
    """
    return env(f"{prefix}_ANONYMOUS", default=False, converter=boolean, help=f"Send requests {how}, for public {what}.")


def is_http_url(text: str) -> bool:
    """Whether ``text`` is an ``http`` or ``https`` URL with a host, a possible port, and neither query nor fragment."""
    try:
        parts = urlsplit(text)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        return False
    return usable and not (parts.query or parts.fragment)


def http_url(*examples: str, accepts: Callable[[str], bool] = is_http_url) -> Callable[[str], str]:
    """Make a converter for the URL of a server, which is returned without a slash at its end.

    It lets URLs pass that hold a user name, a password or a query, because a ``ValueError`` would show them. The class
    refuses them in ``__attrs_post_init__``, with ``refuse_credentials_in_urls``.

    Args:
        *examples: For the message.
        accepts: Whether a URL can be used.
    """

    def convert(text: str) -> str:
        url = text.strip().rstrip("/")
        if not (may_hold_credentials(url) or accepts(url)):
            reason = f"expected a URL such as {' or '.join(examples)}"
            raise ValueError(reason)
        return url

    return convert


def may_hold_credentials(url: str) -> bool:
    """Whether a part of ``url`` may be a secret: a password before the host, or a signature in the query."""
    return "@" in url or "?" in url


def refuse_credentials_in_urls(urls: Mapping[str, str | None], *, hint: str) -> None:
    """Refuse URLs with credentials, without showing them.

    Args:
        urls: Variable -> URL, if it is set.
        hint: Where credentials go instead.

    Raises:
        SettingsError: There are any. It names the variables.
    """
    names = [name for name, url in urls.items() if url is not None and may_hold_credentials(url)]
    if names:
        message = f"{' and '.join(names)} must not contain credentials or a query, which would not be used"
        raise SettingsError(message, hint=f"remove them; {hint}")
