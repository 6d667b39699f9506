"""Why OpenSSL does not accept a certificate, and what to do about it."""

from __future__ import annotations

import ssl
from collections.abc import Mapping

__all__ = ["EXPLAINED_CODES", "UNTRUSTED_HINT", "explain_verification_error"]

#: OpenSSL's verification error -> (what is wrong, likely cause, next step).
_EXPLANATIONS: Mapping[int, tuple[str, str, str]] = {
    9: ("is not valid yet", "the clock of this machine is slow", "set the clock (chronyc tracking, timedatectl)"),
    10: ("has expired", "it was not renewed, or the clock of this machine is fast", "renew it, and check the clock"),
    62: (
        "is for another host",
        "the name in the endpoint is not one that the certificate has",
        "use a host name that the certificate has",
    ),
    64: (
        "is for another host",
        "the address in the endpoint is none that the certificate has",
        "use a host name that the certificate has",
    ),
}

#: OpenSSL's verification errors that do not mean an unknown authority.
EXPLAINED_CODES = frozenset(_EXPLANATIONS)

#: The next step where the authority is unknown; who knows the name of the setting says more.
UNTRUSTED_HINT = "name the file with that authority's certificate"

_UNTRUSTED = (
    "is not trusted",
    "it was signed by an authority of your own, or by a proxy that looks into connections",
    UNTRUSTED_HINT,
)


def explain_verification_error(exc: ssl.SSLCertVerificationError) -> tuple[str, str, str]:
    """What is wrong with the certificate ("has expired"), the likely cause, and the next step."""
    return _EXPLANATIONS.get(exc.verify_code, _UNTRUSTED)
