"""Every kind of credential in every condition: what a load of an object sees, and what the doctor says of it.

fake-gcs-server checks no credentials: a stand-in before it does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cryptography.hazmat.primitives.asymmetric import rsa
from safetensors.torch import save

import modelexpress_core as mx
from devtools.credential_matrices import GCS
from modelexpress_core.doctor import diagnose
from modelexpress_core.errors import AccessDeniedError
from mx_gcs._storage import GcsStorage
from tests.support.network import CLOSED_PORT

#: Kind in the matrix -> kind of the fixture ``variables``.
_KINDS = {
    "anonymous": "key",
    "key of a service account": "key",
    "login of a user in a file": "login",
    "workload identity federation": "external",
    "workload identity federation with impersonation": "external impersonated",
    "impersonated service account in a file": "impersonated",
    "login of gcloud": "gcloud",
    "metadata server (Compute Engine, GKE, Cloud Run)": "metadata",
    "impersonation with any of these": "login",
    "project that pays (Requester Pays)": "key",
}

_MAY_NOT_ACT = {"status": "PERMISSION_DENIED", "message": "Permission 'iam.serviceAccounts.getAccessToken' denied"}


def _of_kind(google: Any, settings: dict[str, str], kind: str, condition: str) -> dict[str, str]:
    """Adds to the settings what a kind has besides its credentials."""
    if kind == "anonymous":
        google.public = condition == "valid"
        return {**settings, "MX_GCS_ANONYMOUS": "1"}
    if kind == "impersonation with any of these":
        del settings["MX_GCS_ENDPOINT"]  # the service has a fixed name
        return {**settings, "MX_GCS_IMPERSONATE_SERVICE_ACCOUNT": google.target}
    if kind == "project that pays (Requester Pays)":
        google.payer = "my-project"
        projects = {"valid": {"MX_GCS_USER_PROJECT": "my-project"}, "wrong": {"MX_GCS_USER_PROJECT": "another"}}
        return {**settings, **projects.get(condition, {})}
    return settings


def _spoil(google: Any, kind: str) -> None:
    """Lets the services accept other credentials than these."""
    if kind == "impersonation with any of these":
        google.refusals = {"iam": (403, {}, json.dumps({"error": _MAY_NOT_ACT}).encode())}
    elif kind != "project that pays (Requester Pays)":
        if kind == "key of a service account":
            google.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
        google.refresh_token = google.subject_token = "another"
        google.refusals = {"metadata": (404, {}, b"")}


@pytest.fixture
def prepared(
    google: Any, variables: Callable[[str], dict[str, str]], tmp_path: Path
) -> Callable[[str, str], dict[str, str]]:
    """Variables for a kind of credential, in a condition."""

    def prepared(kind: str, condition: str) -> dict[str, str]:
        settings = _of_kind(google, variables(_KINDS[kind]), kind, condition)
        if condition == "missing" and not google.payer:
            for name in ("credentials.json", "application_default_credentials.json"):
                (tmp_path / name).unlink(missing_ok=True)
            if _KINDS[kind] == "metadata":
                settings["GCE_METADATA_HOST"] = f"127.0.0.1:{CLOSED_PORT}"
        elif condition == "wrong":
            _spoil(google, kind)
        elif condition.startswith("may not"):
            google.rights = frozenset({"get"} if condition == "may not list" else {"list"})
        elif condition == "expired, and renewed":
            google.before = _once(google.tokens.clear)
        elif condition == "expired, and refused again":
            google.before = lambda _: google.tokens.clear()
        return settings

    return prepared


def _once(act: Callable[[], None]) -> Callable[[Any], None]:
    """Acts at the second request, amid a load."""
    numbers = iter(range(1_000_000))
    return lambda _: act() if next(numbers) == 1 else None


def _loaded(storage: GcsStorage, condition: str, generation: str) -> Iterator[bytes]:
    path = "matrix/object"
    if condition != "may not read":
        (path,) = [info.path for info in storage.list("matrix")]
    for offset in (0, 3):
        buffer = bytearray(3)
        storage.read_into(path, offset, memoryview(buffer), version=generation)
        yield bytes(buffer)


@pytest.mark.parametrize(("kind", "condition"), GCS.cases())
def test_what_a_load_sees(  # a case and its parts
    kind: str,
    condition: str,
    google: Any,
    prepared: Callable[[str, str], dict[str, str]],
    opened: Callable[..., GcsStorage],
    put: Callable[..., str],
) -> None:
    """The object's bytes, or one final error with cause and next step, and without a secret."""
    generation = put("matrix/object", b"content")
    storage = opened(**prepared(kind, condition))
    expected = GCS.kind(kind).outcomes[condition]
    error, content = None, []

    try:
        content = list(_loaded(storage, condition, generation))
    except AccessDeniedError as exc:
        error = exc

    assert expected.checked_by == ("stand-in" if google.asked or google.forms or google.requests else "no server")
    if not expected.cause:
        assert error is None, error
        assert [b"con", b"ten"] == content
        return
    assert error is not None
    assert expected.cause == error.cause, error
    assert error.hint
    assert error.retryable is (kind.startswith("metadata") and condition == "missing")
    assert "ya29." not in str(error)


@pytest.mark.parametrize(("kind", "condition"), [case for case in GCS.cases(doctor=True) if ", and" not in case[1]])
def test_the_doctor_says_the_same(
    kind: str, condition: str, google: Any, prepared: Callable[[str, str], dict[str, str]], put: Callable[..., str]
) -> None:
    """The step that fails has the cause of the error; those before it succeed."""
    put("matrix/object", b"content")
    environ = prepared(kind, condition)
    cause = GCS.kind(kind).outcomes[condition].cause

    # What may be tried again, it tries for four times this long.
    silent = kind.startswith("metadata") and condition == "missing"
    found = diagnose("gs://models/matrix", environ=environ, timeout_seconds=0.2 if silent else 5.0)
    steps = {step.name: step for step in found}

    assert "ok" == steps["connection"].status
    assert [] == [step.name for step in steps.values() if "ya29." in f"{step.seen} {step.facts}"]
    if not cause:
        assert ["ok"] * 3 == [steps[name].status for name in ("credentials", "listing", "read")]
        return
    failed = next(step for step in steps.values() if step.status == "failed")
    assert failed.name in {"credentials", "listing", "read"}
    assert cause == failed.cause, failed
    assert failed.hint


@pytest.mark.parametrize(("kind", "condition"), [case for case in GCS.cases(doctor=True) if ", and" not in case[1]])
def test_a_checkpoint_ends_alike(
    kind: str, condition: str, prepared: Callable[[str, str], dict[str, str]], put: Callable[..., str]
) -> None:
    """The error of a whole load has the same cause; a checkpoint of the usual names loads without the right to list."""
    weights = {"weight": torch.arange(4.0)}
    put("checkpoint/model.safetensors", save(weights))
    environ = {**prepared(kind, condition), "MX_RETRY_BUDGET_SECONDS": "0.1"}
    cause = GCS.kind(kind).outcomes[condition].cause

    if not cause or (condition == "may not list" and kind != "anonymous"):
        state = mx.load_state_dict("gs://models/checkpoint", environ=environ)
        assert torch.equal(weights["weight"], state["weight"])
        return
    with pytest.raises(AccessDeniedError) as caught:
        mx.load_state_dict("gs://models/checkpoint", environ=environ)
    assert cause == caught.value.cause, caught.value


@pytest.mark.parametrize(
    ("stored", "step", "cause"),
    [
        ({"contentEncoding": "gzip"}, "read", "the server, or a proxy before it, encodes by itself, or the object was"),
        (None, "listing", ""),
    ],
)
def test_the_doctor_finds_what_is_wrong_with_a_model(
    stored: dict[str, str] | None, step: str, cause: str, server: Any, put: Callable[..., str], tmp_path: Path
) -> None:
    """Compressed objects, and a directory with nothing in it."""
    directory = f"doctor-{tmp_path.name}"
    if stored is not None:
        put(f"{directory}/model.safetensors", b"content", **stored)

    steps = {found.name: found for found in diagnose(f"gs://models/{directory}", environ=server.environ())}

    assert "failed" == steps[step].status
    assert cause in str(steps[step].cause)
    assert steps[step].hint
