"""Stands for Microsoft Entra ID and the metadata service of machines: gives out tokens that Azurite accepts."""

from __future__ import annotations

import base64
import json
import threading
import time
from typing import Any
from urllib.parse import parse_qs, parse_qsl, urlsplit

from attrs import define, field

from tests.support.scripted_http import Answer, Request

__all__ = ["ASSERTION", "CLIENT", "CONTENT", "SECRET", "TENANT", "TokenServices", "jwt", "refusal"]

TENANT = "11111111-2222-3333-4444-555555555555"
CLIENT = "66666666-7777-8888-9999-000000000000"
SECRET = "the-s3cret-of-the-principal"
ASSERTION = "the-t0ken-of-the-service-account"
#: Of the blob that the tests of tokens read.
CONTENT = bytes(range(256)) * 40


def jwt(number: int, lifetime_seconds: float = 3600, **claims: Any) -> str:
    """A token that Azurite accepts, with a number that tells it from others."""
    now = int(time.time())
    payload = {
        "aud": "https://storage.azure.com",
        "iss": f"https://sts.windows.net/{TENANT}/",
        "iat": now - 60,
        "nbf": now - 60,
        "exp": now + int(lifetime_seconds),
        "tid": TENANT,
        "appid": CLIENT,
        "oid": "the-object",
        "uti": str(number),
        **claims,
    }
    parts = ({"alg": "RS256", "typ": "JWT"}, payload)
    encoded = (base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=").decode() for part in parts)
    return ".".join([*encoded, "c2lnbmF0dXJl"])


@define
class TokenServices:
    """Stands for Entra ID and the metadata service of machines.

    Attributes:
        host: Host and port of Entra ID, by https.
        machine: URL of the metadata service.
        requests: The forms and queries of all requests for tokens.
        tokens: What was given out.
        refusal: The answer that is given in place of a token.
        lifetime_seconds: How long tokens are said to be valid.
        claims: Claims of the tokens from now on.
        gate: Answers wait for it.
    """

    host: str = ""
    machine: str = ""
    requests: list[dict[str, str]] = field(factory=list)
    tokens: list[str] = field(factory=list)
    refusal: Answer | None = None
    lifetime_seconds: float = 3600
    claims: dict[str, Any] = field(factory=dict)
    gate: threading.Event = field(factory=threading.Event)

    def answer(self, request: Request) -> Answer:
        parts = urlsplit(request.path)
        if parts.path.endswith("/openid-configuration"):
            base = f"https://{self.host}/{TENANT}/oauth2/v2.0"
            document = {
                "token_endpoint": f"{base}/token",
                "authorization_endpoint": f"{base}/authorize",
                "issuer": f"https://{self.host}/{TENANT}/v2.0",
            }
            return 200, {"Content-Type": "application/json"}, json.dumps(document).encode()
        form = dict(parse_qsl(request.body.decode()))
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        self.requests.append({**query, **form, "metadata": request.headers.get("Metadata", "")})
        self.gate.wait(10)
        if self.refusal is not None:
            return self.refusal
        self.tokens.append(jwt(len(self.tokens), **self.claims))
        given: dict[str, Any] = {
            "access_token": self.tokens[-1],
            "token_type": "Bearer",
            "expires_in": int(self.lifetime_seconds),
        }
        if request.method == "GET":
            given = {
                **given,
                "resource": query.get("resource", ""),
                "expires_on": str(int(time.time() + self.lifetime_seconds)),
            }
        return 200, {"Content-Type": "application/json"}, json.dumps(given).encode()


def refusal(status: int, *codes: int, error: str = "invalid_client", **headers: str) -> Answer:
    body = {"error": error, "error_codes": list(codes), "error_description": f"AADSTS{codes}: {SECRET} {ASSERTION}"}
    return status, {"Content-Type": "application/json", **headers}, json.dumps(body).encode()
