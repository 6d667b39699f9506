"""Authentication by service accounts: real tokens, reviewed by a real API server, and what costs it nothing."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from devtools.kube_apiserver import KubeApiServer
from modelexpress_core.contracts.authenticator import Call, Refusal, RefusedError
from modelexpress_core.errors import SettingsError
from mx_kubernetes._client import Kubernetes
from mx_kubernetes._reviews import ReviewAuthenticator, open_reviews
from tests.support.network import CLOSED_PORT

pytestmark = [pytest.mark.xdist_group("kubernetes"), pytest.mark.slow]

_T = TypeVar("_T")
_AUDIENCE = "modelexpress"

Authenticating = Callable[..., ReviewAuthenticator]


@pytest.fixture(scope="module")
def account(api_server: KubeApiServer) -> str:
    """A service account, ``namespace:name``."""
    namespace = api_server.new_namespace()
    api_server.new_account(namespace, "vllm")
    return f"{namespace}:vllm"


@pytest.fixture
def new_token(api_server: KubeApiServer, account: str) -> Callable[..., str]:
    def new_token(*audiences: str, seconds: int = 3600) -> str:
        namespace, _, name = account.partition(":")
        return api_server.new_token(namespace, name, audiences or [_AUDIENCE], seconds)

    return new_token


@pytest.fixture
def reviewer(api_server: KubeApiServer, account: str) -> Iterator[str]:
    """Another service account, whose requests the audit log shows apart."""
    namespace, _, _ = account.partition(":")
    name = f"server-{time.monotonic_ns()}"
    api_server.new_account(namespace, name)
    api_server.apply(
        json.dumps(
            {
                "apiVersion": "rbac.authorization.k8s.io/v1",
                "kind": "ClusterRoleBinding",
                "metadata": {"name": name},
                "roleRef": {
                    "apiGroup": "rbac.authorization.k8s.io",
                    "kind": "ClusterRole",
                    "name": "system:auth-delegator",
                },
                "subjects": [{"kind": "ServiceAccount", "namespace": namespace, "name": name}],
            }
        )
    )
    return f"{namespace}:{name}"


@pytest.fixture
def authenticating(api_server: KubeApiServer, account: str, reviewer: str, tmp_path: Path) -> Authenticating:
    namespace, _, name = reviewer.partition(":")
    token = api_server.new_token(namespace, name)

    def authenticating(url: str | None = None, **options: Any) -> ReviewAuthenticator:
        config = api_server.kubeconfig(tmp_path / "config", namespace, token, url)
        given = {"audiences": ["other", _AUDIENCE], "allowed": [account], **options}
        return ReviewAuthenticator(Kubernetes({"KUBECONFIG": str(config)}), **given)

    return authenticating


def used(authenticator: ReviewAuthenticator, scenario: Callable[[], Awaitable[_T]]) -> _T:
    async def using() -> _T:
        try:
            return await scenario()
        finally:
            await authenticator._api.close()

    return asyncio.run(using())


async def refusal(authenticator: ReviewAuthenticator, token: str | None) -> tuple[Refusal, str]:
    with pytest.raises(RefusedError) as raised:
        await authenticator.authenticate(Call(token))
    assert token is None or token not in raised.value.reason
    return raised.value.refusal, raised.value.reason


def reviews(server: KubeApiServer, reviewer: str) -> int:
    """How many reviews were asked for."""
    return sum(
        event["objectRef"]["resource"] == "tokenreviews"
        for event in server.audited(f"system:serviceaccount:{reviewer}")
    )


def forged(**claims: Any) -> str:
    parts = ({"alg": "RS256"}, {"aud": [_AUDIENCE], "exp": time.time() + 3600, **claims})
    encoded = [base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts]
    return ".".join([*encoded, "c2lnbmF0dXJl"])


def test_a_caller_is_named_by_its_service_account(
    api_server: KubeApiServer,
    authenticating: Authenticating,
    account: str,
    reviewer: str,
    new_token: Callable[..., str],
) -> None:
    """One review for all of its calls, also for those at the same time."""
    authenticator, token = authenticating(), new_token()

    async def scenario() -> list[str]:
        at_once = await asyncio.gather(*(authenticator.authenticate(Call(token)) for _ in range(50)))
        return [*at_once, await authenticator.authenticate(Call(token))]

    names = used(authenticator, scenario)

    assert {f"system:serviceaccount:{account}"} == set(names)
    assert 1 == reviews(api_server, reviewer)


def test_callers_that_are_refused(
    api_server: KubeApiServer,
    authenticating: Authenticating,
    account: str,
    reviewer: str,
    new_token: Callable[..., str],
) -> None:
    """Each with the reason; a refusal is remembered, and what cannot be a token for this server is not even asked."""
    namespace, _, _ = account.partition(":")
    api_server.new_account(namespace, "stranger")
    stranger = api_server.new_token(namespace, "stranger", [_AUDIENCE])
    authenticator = authenticating()
    unasked = {
        None: "none was sent",
        "a-static-token": "not one of a service account",
        "a.b.c": "not one of a service account",
        "x" * (1 << 20): "not one of a service account",
        f"{'x' * (1 << 14)}.y.z": "not one of a service account",
        new_token("https://kubernetes.default.svc"): "for another audience than this server: other, modelexpress",
        forged(exp=time.time() - 1): "has expired",
        forged(exp="never"): "has expired",
        forged(aud=None): "for another audience",
    }
    lied = forged()

    async def scenario() -> None:
        for token, reason in unasked.items():
            refused, said = await refusal(authenticator, token)
            assert (Refusal.UNAUTHENTICATED, True) == (refused, reason in said), said
        for _ in range(3):
            refused, said = await refusal(authenticator, lied)
            assert (Refusal.UNAUTHENTICATED, "does not know the token") == (refused, said[11:34])
            refused, said = await refusal(authenticator, stranger)
            assert Refusal.PERMISSION_DENIED == refused
            assert f"system:serviceaccount:{namespace}:stranger may not call this server" in said

    used(authenticator, scenario)

    assert 2 == reviews(api_server, reviewer)


def test_answers_are_used_for_a_limited_time(
    api_server: KubeApiServer, authenticating: Authenticating, reviewer: str, new_token: Callable[..., str]
) -> None:
    """As long as the setting says, and never longer than the token lasts."""
    now = [0.0]
    token = new_token(seconds=600)
    authenticator = authenticating(cache_seconds=3600.0, clock=lambda: now[0], wall_clock=lambda: time.time() + now[0])

    async def scenario() -> None:
        await authenticator.authenticate(Call(token))
        now[0] = 500.0
        await authenticator.authenticate(Call(token))
        assert 1 == reviews(api_server, reviewer)
        now[0] = 700.0
        refused, said = await refusal(authenticator, token)
        assert (Refusal.UNAUTHENTICATED, True) == (refused, "has expired" in said)

    used(authenticator, scenario)


def test_an_account_that_is_removed_is_refused_after_that_time(
    api_server: KubeApiServer, authenticating: Authenticating, reviewer: str
) -> None:
    """The API server knows no revoked token."""
    namespace, _, _ = reviewer.partition(":")
    api_server.new_account(namespace, "leaving")
    token = api_server.new_token(namespace, "leaving", [_AUDIENCE])
    now = [0.0]
    authenticator = authenticating(allowed=[f"{namespace}:leaving"], clock=lambda: now[0])

    async def scenario() -> None:
        await authenticator.authenticate(Call(token))
        api_server.request("DELETE", f"/api/v1/namespaces/{namespace}/serviceaccounts/leaving")
        deadline = time.monotonic() + 60  # the API server itself remembers tokens for some seconds
        with pytest.raises(RefusedError) as raised:
            while time.monotonic() < deadline:
                now[0] += 61.0
                await authenticator.authenticate(Call(token))
                await asyncio.sleep(0.1)
        assert Refusal.UNAUTHENTICATED == raised.value.refusal

    used(authenticator, scenario)


def test_strangers_push_out_no_caller(authenticating: Authenticating, new_token: Callable[..., str]) -> None:
    """What is known of callers and what is refused are kept apart, and both are bounded."""
    authenticator, token = authenticating(), new_token()

    async def scenario() -> None:
        await authenticator.authenticate(Call(token))
        await asyncio.gather(*(refusal(authenticator, forged(jti=str(number))) for number in range(40)))
        assert 1 == len(authenticator._known)
        assert 40 == len(authenticator._refused)
        assert {} == authenticator._reviews

    used(authenticator, scenario)


def test_an_api_server_that_does_not_answer(authenticating: Authenticating, new_token: Callable[..., str]) -> None:
    """Is UNAVAILABLE, and not remembered; a flood of tokens waits in no queue without end."""
    authenticator = authenticating(url=f"https://127.0.0.1:{CLOSED_PORT}")

    async def scenario() -> None:
        refused, said = await refusal(authenticator, new_token())
        assert Refusal.UNAVAILABLE == refused
        assert "the API server of Kubernetes cannot review the token: Kubernetes: cannot create tokenreviews" in said
        assert 0 == len(authenticator._refused)
        answers = await asyncio.gather(*(refusal(authenticator, forged(jti=str(number))) for number in range(400)))
        assert {Refusal.UNAVAILABLE} == {refused for refused, _ in answers}
        assert 400 - 256 == sum("too many tokens wait" in said for _, said in answers)

    used(authenticator, scenario)


def test_a_reviewer_without_rights(
    api_server: KubeApiServer, account: str, tmp_path: Path, new_token: Callable[..., str]
) -> None:
    """No caller is let in, and the reason says what is missing."""
    namespace, _, name = account.partition(":")
    config = api_server.kubeconfig(tmp_path / "config", namespace, api_server.new_token(namespace, name))
    authenticator = ReviewAuthenticator(
        Kubernetes({"KUBECONFIG": str(config)}), audiences=[_AUDIENCE], allowed=[account]
    )

    refused, said = used(authenticator, lambda: refusal(authenticator, new_token()))

    assert Refusal.UNAVAILABLE == refused
    assert "python -m mx_kubernetes role" in said


def test_the_settings(tmp_path: Path) -> None:
    """Both lists are needed, so that no slip lets everybody in; accounts are written as ``namespace:name``."""
    config = tmp_path / "config"
    config.touch()
    audiences = {"MODEL_EXPRESS_SECURITY_TOKEN_AUDIENCES": "modelexpress", "KUBECONFIG": str(config)}
    allowed = {"MODEL_EXPRESS_SECURITY_ALLOWED_SERVICE_ACCOUNTS": "inference:vllm,training:trainer"}

    with pytest.raises(SettingsError, match=r"_TOKEN_AUDIENCES and MODEL_EXPRESS_SECURITY_ALLOWED_SERVICE_ACCOUNTS"):
        open_reviews({})
    with pytest.raises(SettingsError, match="needs MODEL_EXPRESS_SECURITY_ALLOWED_SERVICE_ACCOUNTS"):
        open_reviews(audiences)
    with pytest.raises(SettingsError, match="'vllm' is no service account; expected namespace:name"):
        open_reviews({**audiences, "MODEL_EXPRESS_SECURITY_ALLOWED_SERVICE_ACCOUNTS": "vllm"})
    authenticator = open_reviews({**audiences, **allowed})

    assert {"system:serviceaccount:inference:vllm", "system:serviceaccount:training:trainer"} == authenticator._allowed
    assert authenticator.by_certificate is False
