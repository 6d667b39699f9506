"""The settings of the plugin for the Hugging Face Hub: the variables of huggingface_hub, and a few ``MX_HF_`` ones."""

from __future__ import annotations

import os
from collections.abc import Mapping

from attrs import frozen

from modelexpress_core.settings import boolean, env, from_env, variables
from modelexpress_core.settings.http import (
    ca_bundle,
    connect_timeout,
    http_url,
    is_http_url,
    read_timeout,
    refuse_credentials_in_urls,
)

__all__ = ["HfSettings", "hf_settings"]


def _is_usable(url: str) -> bool:
    from modelexpress_core.storage.http.requests import Origin  # costs much of an import of the plugin

    try:
        Origin.of_url(url)
    except ValueError:
        return False
    return is_http_url(url)


@frozen
class HfSettings:
    """How the Hugging Face Hub is reached, and with which token.

    The token is HF_TOKEN, or that of a login (``hf auth login``).
    """

    token: str | None = env(
        "HF_TOKEN",
        "HUGGING_FACE_HUB_TOKEN",
        default=None,
        secret=True,
        help="Token for private and gated repositories; unset: that of a login.",
    )
    token_file: str | None = env(
        "HF_TOKEN_PATH",
        default=None,
        help="File with the token of a login; unset: token in HF_HOME.",
    )
    home: str | None = env(
        "HF_HOME",
        default=None,
        help="Directory of huggingface_hub; unset: huggingface in XDG_CACHE_HOME.",
    )
    cache_home: str = env(
        "XDG_CACHE_HOME",
        default="~/.cache",
        help="Directory of the caches of all programs.",
    )
    cache: str | None = env(
        "HF_HUB_CACHE",
        "HUGGINGFACE_HUB_CACHE",
        default=None,
        help="Directory of what huggingface_hub downloads, which is read offline; unset: hub in HF_HOME.",
    )
    token_disabled: bool = env(
        "HF_HUB_DISABLE_IMPLICIT_TOKEN",
        default=False,
        converter=boolean,
        help="Send requests without a token, for public repositories.",
    )
    endpoint: str = env(
        "HF_ENDPOINT",
        default="https://huggingface.co",
        converter=http_url("https://huggingface.co", "http://127.0.0.1:8080", accepts=_is_usable),
        help="URL of the Hub, or of a mirror. It gets the token.",
    )
    offline: bool = env(
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        default=False,
        converter=boolean,
        help="Send no requests: loads of hf:// read what huggingface_hub has downloaded, or fail.",
    )
    ca_bundle: str | None = ca_bundle("MX_HF_CA_BUNDLE", "REQUESTS_CA_BUNDLE", unset="those of this system")
    connect_timeout_seconds: float = connect_timeout("MX_HF")
    read_timeout_seconds: float = read_timeout("MX_HF")

    def __attrs_post_init__(self) -> None:
        """Refuse a URL with credentials, without showing it."""
        refuse_credentials_in_urls({"HF_ENDPOINT": self.endpoint}, hint="HF_TOKEN is the token")

    @property
    def token_path(self) -> str:
        """The file with the token of a login."""
        return _expanded(self.token_file or os.path.join(self._home, "token"))

    @property
    def cache_directory(self) -> str:
        """The directory of downloaded repositories."""
        return _expanded(self.cache or os.path.join(self._home, "hub"))

    @property
    def _home(self) -> str:
        return self.home or os.path.join(self.cache_home, "huggingface")


def hf_settings(environ: Mapping[str, str]) -> HfSettings:
    """The settings in ``environ``; huggingface_hub's own variables that it does not name, from the process.

    Raises:
        SettingsError: A variable has a value that cannot be used.
    """
    shared = [name for name in variables(HfSettings) if not name.startswith("MX_")]
    return from_env(HfSettings, {**{name: os.environ[name] for name in shared if name in os.environ}, **environ})


def _expanded(path: str) -> str:
    return os.path.expandvars(os.path.expanduser(path))
