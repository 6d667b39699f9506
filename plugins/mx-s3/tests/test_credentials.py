"""As whom requests are signed: every place that gives credentials, and a real load with what it gave."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import modelexpress_core as mx
from devtools.seaweedfs import SeaweedFS
from modelexpress_core.errors import AccessDeniedError
from mx_s3._storage import S3Storage
from tests.support.network import CLOSED_PORT

NO_KEYS = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}


def test_credentials_from_variables(opened: Callable[..., S3Storage], server: SeaweedFS) -> None:
    """The end of the key is shown, and no more of it."""
    key = server.environ()["AWS_ACCESS_KEY_ID"]

    said = opened().credentials()

    assert f"access key ...{key[-4:]}, from AWS_ACCESS_KEY_ID (explicit)" == said


def test_credentials_of_a_profile(opened: Callable[..., S3Storage], tmp_path: Path) -> None:
    """The profile and the file are named."""
    file = tmp_path / "credentials"
    file.write_text("[serving]\naws_access_key_id = AKIDEXAMPLE\naws_secret_access_key = s3cret\n")

    said = opened(AWS_PROFILE="serving", AWS_SHARED_CREDENTIALS_FILE=str(file), **NO_KEYS).credentials()

    assert "access key ...MPLE, from the profile serving in the credentials file (shared-credentials-file)" == said


def test_anonymous_requests_have_no_credentials(opened: Callable[..., S3Storage]) -> None:
    """Unsigned requests have no key."""
    assert "none: requests are not signed (MX_S3_ANONYMOUS)" == opened(MX_S3_ANONYMOUS="1").credentials()


def test_no_credentials(opened: Callable[..., S3Storage]) -> None:
    """Where there are none, that is an error with what to set."""
    storage = opened(**NO_KEYS)

    with pytest.raises(AccessDeniedError, match="could not find the credentials of s3://models: no credentials were"):
        storage.credentials()


def _error(code: str, status: int) -> tuple[int, dict[str, str], bytes]:
    body = f"<ErrorResponse><Error><Code>{code}</Code><Message>s3cret</Message></Error></ErrorResponse>"
    return status, {}, body.encode()


@pytest.mark.parametrize(
    ("from_role", "asked", "whose"),
    [
        ("web identity", "sts", "of a role assumed with a web identity token (assume-role-with-web-identity)"),
        ("metadata", "metadata", "of the role of this machine, from the instance metadata service (iam-role)"),
        ("container", "container", "of the role of this container (container-role)"),
    ],
    indirect=["from_role"],
)
def test_a_load_with_the_credentials_of_a_role(
    from_role: dict[str, str | None],
    services: Any,
    server: SeaweedFS,
    opened: Callable[..., S3Storage],
    put: Callable[..., str],
    asked: str,
    whose: str,
) -> None:
    """Variables alone lead to the role, one request fetches its credentials, and they load a checkpoint."""
    weights = {"weight": torch.arange(100_000, dtype=torch.float32)}
    put("roles/model.safetensors", save(weights))
    variables = {**server.environ("stranger"), **from_role}
    environ = {name: value for name, value in variables.items() if value is not None}

    state = mx.load_state_dict("s3://models/roles", environ=environ)

    assert torch.equal(weights["weight"], state["weight"])
    assert [asked] == services.requests
    assert f"access key ...{services.keys[0][-4:]}, {whose}" == opened(**from_role).credentials()


@pytest.mark.parametrize("from_role", ["web identity"], indirect=True)
def test_sts_is_told_who_wants_which_role(
    from_role: dict[str, str | None], services: Any, opened: Callable[..., S3Storage]
) -> None:
    """The token is read from its file; role and session are those of the variables."""
    opened(**from_role).credentials()

    assert (services.role_arn, "test", services.web_identity_token) == (
        services.web_identity["RoleArn"],
        services.web_identity["RoleSessionName"],
        services.web_identity["WebIdentityToken"],
    )


@pytest.mark.parametrize("from_role", ["web identity", "metadata", "container"], indirect=True)
def test_roles_of_the_processs_environment(
    from_role: dict[str, str | None],
    services: Any,
    opened: Callable[..., S3Storage],
    put: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What the settings do not hold, botocore finds where it always does."""
    put("roles/object", b"content")
    for name, value in from_role.items():
        if value is not None:
            monkeypatch.setenv(name, value)

    storage = opened(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None, AWS_EC2_METADATA_DISABLED=None)

    assert 7 == storage.stat("roles/object").size
    assert 1 == len(services.requests)


def test_settings_go_before_the_processs_environment(
    services: Any, opened: Callable[..., S3Storage], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of one variable, or of those that stand for each other, the value in the settings holds."""
    token = tmp_path / "token"
    token.write_text(services.container_token)
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1:1/elsewhere")
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/elsewhere")
    monkeypatch.setenv("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", str(tmp_path / "missing"))

    said = opened(
        AWS_CONTAINER_CREDENTIALS_FULL_URI=f"{services.url}/v1/credentials",
        AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE=str(token),
        **NO_KEYS,
    ).credentials()

    assert "container-role" in said


@pytest.mark.parametrize("from_role", ["container"], indirect=True)
def test_the_token_of_a_container_can_be_a_variable(
    from_role: dict[str, str | None], services: Any, opened: Callable[..., S3Storage]
) -> None:
    """ECS sets it so."""
    token = {"AWS_CONTAINER_AUTHORIZATION_TOKEN": services.container_token}

    said = opened(**{**from_role, **token, "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": None}).credentials()

    assert "container-role" in said


@pytest.mark.parametrize(
    ("from_role", "refusal", "retryable", "says"),
    [
        ("web identity", _error("AccessDenied", 403), False, ["HTTP 403, AccessDenied", "trust policy", "sub and aud"]),
        ("web identity", _error("InvalidIdentityToken", 400), False, ["OIDC provider", "audience"]),
        ("web identity", _error("ExpiredTokenException", 400), False, ["AWS_WEB_IDENTITY_TOKEN_FILE", "renews"]),
        ("web identity", _error("ValidationError", 400), False, ["AWS_ROLE_ARN"]),
        ("web identity", _error("IDPCommunicationError", 400), True, ["STS cannot reach"]),
        ("web identity", _error("Throttling", 400), True, ["asked too much"]),
        ("web identity", _error("InternalFailure", 500), True, ["passing fault"]),
        ("web identity", _error("StrangeThing", 400), False, ["aws sts get-caller-identity"]),
        ("container", (404, {}, b"s3cret"), False, ["HTTP 404", "association of the service account"]),
        ("container", (500, {}, b"s3cret"), True, ["HTTP 500", "EKS Pod Identity"]),
        ("container", (200, {}, b"{}"), False, ["AccessKeyId, SecretAccessKey, Token and Expiration"]),
        ("metadata", (404, {}, b"s3cret"), False, ["metadata service was asked at http://127.0.0.1", "hop limit"]),
        ("metadata", (200, {}, b'{"Code": "AssumeRoleUnauthorizedAccess", "Message": ""}'), False, ["has no role"]),
    ],
    indirect=["from_role"],
)
def test_a_role_that_is_refused(
    from_role: dict[str, str | None],
    services: Any,
    opened: Callable[..., S3Storage],
    refusal: Any,
    retryable: bool,
    says: list[str],
) -> None:
    """The service that refuses is named, with the likely cause and what to check; its own words are not repeated."""
    services.refusal = refusal
    storage = opened(**from_role)

    with pytest.raises(AccessDeniedError) as reading:
        storage.read_into("object", 0, memoryview(bytearray(1)), version=None)
    with pytest.raises(AccessDeniedError) as asking:
        storage.credentials()

    for error in (reading.value, asking.value):
        assert [] == [words for words in says if words not in str(error)], str(error)
        assert retryable is error.retryable
        assert "s3cret" not in str(error)
        assert error.hint


_CLOSED_URL = f"http://127.0.0.1:{CLOSED_PORT}"


@pytest.mark.parametrize(
    ("from_role", "changed", "retryable", "says"),
    [
        ("web identity", {"AWS_WEB_IDENTITY_TOKEN_FILE": "/no/token"}, False, ["/no/token", "not mounted"]),
        ("web identity", {"AWS_ENDPOINT_URL_STS": _CLOSED_URL}, True, ["no connection", "AWS_ENDPOINT_URL_STS"]),
        ("web identity", {"AWS_ENDPOINT_URL_STS": "http://sts.invalid"}, False, ["does not resolve"]),
        ("web identity", {"AWS_ROLE_ARN": None}, False, ["AWS_ROLE_ARN"]),
        ("container", {"AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "/no/token"}, False, ["/no/token", "not mounted"]),
        ("container", {"AWS_CONTAINER_CREDENTIALS_FULL_URI": f"{_CLOSED_URL}/x"}, True, ["does not answer"]),
        ("container", {"AWS_CONTAINER_CREDENTIALS_FULL_URI": "http://example.com/x"}, False, ["may only name https"]),
        ("metadata", {"AWS_EC2_METADATA_SERVICE_ENDPOINT": _CLOSED_URL}, False, ["cannot be reached", "hop limit"]),
        ("metadata", {"AWS_EC2_METADATA_DISABLED": "1"}, False, ["AWS_EC2_METADATA_DISABLED"]),
    ],
    indirect=["from_role"],
)
def test_a_role_that_cannot_be_asked_for(
    from_role: dict[str, str | None],
    opened: Callable[..., S3Storage],
    changed: dict[str, str | None],
    retryable: bool,
    says: list[str],
) -> None:
    """What is missing, misspelt, down or switched off is named."""
    storage = opened(**{**from_role, **changed})

    with pytest.raises(AccessDeniedError) as caught:
        storage.stat("object")

    assert [] == [words for words in says if words not in str(caught.value)], str(caught.value)
    assert retryable is caught.value.retryable
    assert caught.value.hint


@pytest.mark.parametrize("from_role", ["container"], indirect=True)
def test_a_token_of_two_lines(from_role: dict[str, str | None], opened: Callable[..., S3Storage]) -> None:
    """It is no header, and never shown."""
    Path(str(from_role["AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"])).write_text("s3cret\nsecond")

    with pytest.raises(AccessDeniedError, match="token is one line") as caught:
        opened(**from_role).credentials()

    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("from_role", ["metadata"], indirect=True)
def test_nothing_is_asked_before_the_first_request(
    from_role: dict[str, str | None], services: Any, opened: Callable[..., S3Storage]
) -> None:
    """Opening a storage costs no request, though the place of its credentials is far."""
    storage = opened(**from_role)

    assert [] == services.requests
    assert storage.credentials()
    assert ["metadata"] == services.requests


# -- programs and roles of profiles ------------------------------------------------------------------------------------


def _profile(directory: Path, *lines: str) -> dict[str, str | None]:
    """Variables that lead to a profile with these lines."""
    file = directory / "config"
    file.write_text("\n".join(["[profile serving]", *lines, ""]))
    return {**NO_KEYS, "AWS_PROFILE": "serving", "AWS_CONFIG_FILE": str(file)}


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("/no/such/program --now", "it cannot be started: /no/such/program"),
        ("sh -c 'echo s3cret >&2; exit 3'", "it ended with the status 3"),
        ("echo s3cret", "it did not print a JSON object"),
        ("sleep 600", "it ran for more than 0.4 s"),
        ("sh -c 'sleep 8 & wait'", "it ran for more than 0.4 s"),
    ],
)
@pytest.mark.parametrize("through_a_role", [False, True])
def test_a_program_that_gives_no_credentials(
    command: str, says: str, through_a_role: bool, services: Any, opened: Callable[..., S3Storage], tmp_path: Path
) -> None:
    """The error says what it did, ends it after a while, and repeats nothing that it printed."""
    program = f"credential_process = {command}"
    role = [f"role_arn = {services.role_arn}", "source_profile = source", "[profile source]"]
    variables = _profile(tmp_path, *(role if through_a_role else ()), program)
    storage = opened(**variables, MX_S3_READ_TIMEOUT_SECONDS="0.2", AWS_ENDPOINT_URL_STS=services.url)
    begun = time.monotonic()

    with pytest.raises(AccessDeniedError, match=f"the program of the profile gave no credentials: {says}") as caught:
        storage.credentials()

    assert time.monotonic() - begun < 7
    assert not caught.value.retryable
    assert "credential_process" in str(caught.value.cause)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("from_role", ["container"], indirect=True)
def test_a_role_that_is_assumed_with_that_of_the_container(
    from_role: dict[str, str | None],
    services: Any,
    opened: Callable[..., S3Storage],
    put: Callable[..., str],
    tmp_path: Path,
) -> None:
    """The variables in the settings lead to the container's role, also if a profile names it as its source."""
    put("roles/object", b"content")
    profile = _profile(tmp_path, f"role_arn = {services.role_arn}", "credential_source = EcsContainer")

    storage = opened(**{**from_role, **profile}, AWS_ENDPOINT_URL_STS=services.url)

    assert 7 == storage.stat("roles/object").size
    assert ["container", "sts"] == services.requests
    assert "of the role in the profile serving" in storage.credentials()
