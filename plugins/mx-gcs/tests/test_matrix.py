"""Every kind of credentials in every condition: what a load of an object sees, and what the doctor says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from modelexpress_core.doctor import diagnose
from modelexpress_core.errors import AccessDeniedError
from mx_gcs._storage import GcsStorage
from tests.support.network import CLOSED_PORT

_NO_FILE = "GOOGLE_APPLICATION_CREDENTIALS, or the credential_source in its file, is misspelt or not mounted here"
_NOWHERE = "neither GOOGLE_APPLICATION_CREDENTIALS nor a login of gcloud gives any"
_LOGIN_ENDED = "the login of the user ran out or was revoked"
_REFUSED_AGAIN = "the access token ran out or was revoked, and a newly fetched one is refused too, or is the same"
_NO_RIGHT = "these credentials may not read it, or it does not exist and they may not list the bucket"

#: Kind of credentials -> condition -> how the likely cause begins; empty where the load succeeds.
MATRIX: Mapping[str, Mapping[str, str]] = {
    kind: {
        "valid": "",
        "missing": missing,
        "wrong": wrong,
        "expired, and renewed": "",
        "expired, and refused again": _REFUSED_AGAIN,
        "may not list": _NO_RIGHT,
        "may not read": _NO_RIGHT,
    }
    for kind, missing, wrong in (
        ("key", _NO_FILE, "the key of the service account was deleted or disabled, or the file was altered"),
        ("login", _NO_FILE, _LOGIN_ENDED),
        ("gcloud", _NOWHERE, _LOGIN_ENDED),
        ("external", _NO_FILE, "the workload identity pool does not accept the token of this workload"),
        ("external impersonated", _NO_FILE, "the workload identity pool does not accept the token of this workload"),
        ("impersonated", _NO_FILE, _LOGIN_ENDED),
        ("metadata", "the metadata server of this machine or pod does not answer", "this machine has no service acc"),
    )
}

_CASES = [(kind, condition) for kind, conditions in MATRIX.items() for condition in conditions]


@pytest.fixture
def prepared(
    google: Any, variables: Callable[[str], dict[str, str]], tmp_path: Path
) -> Callable[[str, str], dict[str, str]]:
    """Variables for a kind of credentials, in a condition."""

    def prepared(kind: str, condition: str) -> dict[str, str]:
        settings = variables(kind)
        if condition == "missing":
            for name in ("credentials.json", "application_default_credentials.json"):
                (tmp_path / name).unlink(missing_ok=True)
            if kind == "metadata":
                settings["GCE_METADATA_HOST"] = f"127.0.0.1:{CLOSED_PORT}"
        elif condition == "wrong":
            if kind == "key":
                google.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
            google.refresh_token = google.subject_token = "another"
            google.refusals = {"metadata": (404, {}, b"")}
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


def _loaded(storage: GcsStorage, generation: str) -> Iterator[bytes]:
    (info,) = storage.list("matrix")
    for offset in (0, 3):
        buffer = bytearray(3)
        storage.read_into(info.path, offset, memoryview(buffer), version=generation)
        yield bytes(buffer)


@pytest.mark.parametrize(("kind", "condition"), _CASES)
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
    cause = MATRIX[kind][condition]

    if not cause:
        assert [b"con", b"ten"] == list(_loaded(storage, generation))
        return
    with pytest.raises(AccessDeniedError) as caught:
        list(_loaded(storage, generation))
    assert str(caught.value.cause).startswith(cause)
    assert caught.value.hint
    assert (kind, condition) == ("metadata", "missing") or not caught.value.retryable
    assert "ya29." not in str(caught.value)


@pytest.mark.parametrize("kind", ["key", "gcloud", "metadata"])
@pytest.mark.parametrize("condition", ["valid", "missing", "wrong", "may not list", "may not read"])
def test_the_doctor_says_the_same(
    kind: str, condition: str, google: Any, prepared: Callable[[str, str], dict[str, str]], put: Callable[..., str]
) -> None:
    """The step that fails has the cause of the error; those before it succeed."""
    put("matrix/object", b"content")
    environ = prepared(kind, condition)

    # What may be tried again, it tries for four times this long.
    timeout_seconds = 0.2 if (kind, condition) == ("metadata", "missing") else 5.0
    found = diagnose("gs://models/matrix", environ=environ, timeout_seconds=timeout_seconds)
    steps = {step.name: step for step in found}

    failing = {"missing": "credentials", "wrong": "credentials", "may not list": "listing", "may not read": "read"}
    assert "ok" == steps["connection"].status
    if condition == "valid":
        assert "service account" in steps["credentials"].seen or "login of a user" in steps["credentials"].seen
        assert ["ok"] * 3 == [steps[name].status for name in ("credentials", "listing", "read")]
        return
    failed = steps[failing[condition]]
    assert "failed" == failed.status
    assert str(failed.cause).startswith(MATRIX[kind][condition])
    assert failed.hint
    assert [] == [step.name for step in steps.values() if "ya29." in f"{step.seen} {step.facts}"]


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
