"""Which token requests carry, and that it goes nowhere but to the endpoint."""

from __future__ import annotations

import os
import re
import threading

from attrs import field, frozen

from modelexpress_core.storage.http import Origin
from mx_hf._errors import TokenError
from mx_hf.settings import HfSettings

__all__ = ["Identity", "Token"]

#: What a header can hold (RFC 9110 section 5.5), without spaces. The Hub's own tokens have some forty characters,
#: those of its OAuth some hundreds.
_TOKEN = re.compile(r"[!-~]{1,8192}")

_MAX_FILE_BYTES = 64 << 10


@frozen
class Token:
    """A token.

    Attributes:
        value: The token.
        place: Where it was found, for people.
    """

    value: str = field(repr=False)
    place: str


class Identity:
    """The token of one storage, found at the first request. Thread-safe.

    Args:
        settings: Where it may be.
    """

    def __init__(self, settings: HfSettings) -> None:
        self._settings = settings
        self._origin = Origin.of_url(settings.endpoint)
        self._lock = threading.Lock()
        self._found = False
        self._token: Token | None = None

    def headers(self) -> tuple[tuple[str, str], ...]:
        """What a request to the endpoint carries.

        Raises:
            TokenError: There is a token that cannot be used.
        """
        token = self._current()
        return () if token is None else (("Authorization", f"Bearer {token.value}"),)

    def renew(self, refused: str) -> bool:
        """Whether there is another token than the one in ``refused``, an ``Authorization`` header.

        A login may have renewed its token since.

        Raises:
            TokenError: As for ``headers``.
        """
        with self._lock:
            if self._token is None:
                return False
            if f"Bearer {self._token.value}" == refused:
                self._token = self._find()
            return self._token is not None and f"Bearer {self._token.value}" != refused

    def describe(self) -> str:
        """The token's place, for people.

        Raises:
            TokenError: As for ``headers``.
        """
        token = self._current()
        if token is not None:
            return f"a token, from {token.place}"
        if self._settings.token_disabled:
            return "none: requests carry no token (HF_HUB_DISABLE_IMPLICIT_TOKEN)"
        return f"none: HF_TOKEN is not set, and there is no login in {self._settings.token_path}"

    def _current(self) -> Token | None:
        with self._lock:
            if not self._found:
                self._token = self._find()
                self._found = True
            return self._token

    def _find(self) -> Token | None:
        if self._settings.token_disabled:
            return None
        token = self._of_variable() or self._of_login()
        if token is None:
            return None
        if not _TOKEN.fullmatch(token.value):
            raise TokenError("it has characters that no token has, or is too long", token.place)
        if not self._origin.tls and not self._origin.is_loopback:
            reason = "HF_ENDPOINT is an http:// URL of another machine, so the token would be sent unencrypted"
            raise TokenError(reason, token.place)
        return token

    def _of_variable(self) -> Token | None:
        value = (self._settings.token or "").strip()
        return Token(value, "HF_TOKEN") if value else None

    def _of_login(self) -> Token | None:
        path = self._settings.token_path
        value = self._of_library(path) if self._is_of_library(path) else _read(path)
        return Token(value, path) if value else None

    def _is_of_library(self, path: str) -> bool:
        """Whether huggingface_hub would take the same file, and use it with the same Hub.

        It reads its variables when it is imported; those of this load may be others.
        """
        from huggingface_hub import constants

        same_hub = self._settings.endpoint == constants.ENDPOINT
        return same_hub and os.path.abspath(constants.HF_TOKEN_PATH) == os.path.abspath(path)

    def _of_library(self, path: str) -> str:
        """The token of a login, which huggingface_hub renews if it runs out soon."""
        from huggingface_hub import get_token

        try:
            return get_token() or ""
        except Exception as exc:  # it raises what its HTTP library raises, which differs by version
            raise TokenError(f"huggingface_hub could not read or renew it [{type(exc).__name__}]", path) from exc


def _read(path: str) -> str:
    """The first bytes of a file without spaces and line breaks around; empty if there is no file."""
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FILE_BYTES)
    except FileNotFoundError:
        return ""
    except OSError as exc:
        raise TokenError(f"the file cannot be read [{type(exc).__name__}]", path) from exc
    return content.decode("utf-8", "replace").strip()
