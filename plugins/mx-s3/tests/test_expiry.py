"""Credentials that S3 no longer takes in the middle of a load: others are fetched once, and it goes on."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

import modelexpress_core as mx
from devtools.seaweedfs import SeaweedFS
from modelexpress_core.errors import AccessDeniedError
from mx_s3._storage import S3Storage

CONTENT = os.urandom(64 * 10_000)
ROLES = ["web identity", "metadata", "container"]


class Expiring:
    """An answer to requests that are signed with keys that ran out."""

    def __init__(self, code: str = "ExpiredToken", status: int = 400) -> None:
        self.expired: set[str] = set()
        self.refused = 0
        self._lock = threading.Lock()
        self._answer = (status, f"<Error><Code>{code}</Code><Message>The provided token has expired.</Message></Error>")

    def __call__(self, request: Any) -> Any:
        if request.access_key not in self.expired:
            return None
        with self._lock:
            self.refused += 1
        status, body = self._answer
        return status, {}, b"" if request.method == "HEAD" else body.encode()


@pytest.fixture
def keys(server: SeaweedFS) -> dict[str, tuple[str, str]]:
    def of(user: str) -> tuple[str, str]:
        environ = server.environ(user)
        return environ["AWS_ACCESS_KEY_ID"], environ["AWS_SECRET_ACCESS_KEY"]

    return {user: of(user) for user in ("admin", "reader")}


def _read(storage: S3Storage, part: int) -> bytes:
    memory = bytearray(10_000)
    storage.read_into("expiry/object", part * 10_000, memoryview(memory), version=None)
    return bytes(memory)


@pytest.mark.parametrize("from_role", ROLES, indirect=True)
@pytest.mark.parametrize(
    ("code", "status"), [("ExpiredToken", 400), ("InvalidToken", 400), ("InvalidAccessKeyId", 403)]
)
def test_many_reads_meet_the_expiry_and_one_of_them_fetches_others(
    from_role: dict[str, str | None],
    services: Any,
    keys: dict[str, tuple[str, str]],
    fronted: Callable[..., str],
    opened: Callable[..., S3Storage],
    put: Callable[..., str],
    code: str,
    status: int,
) -> None:
    """Sixteen threads are refused at the same moment: one request for others, and every byte arrives."""
    put("expiry/object", CONTENT)
    expiring = Expiring(code, status)
    storage = opened(AWS_ENDPOINT_URL=fronted(expiring), **from_role)
    before = _read(storage, 0)
    services.keys = keys["admin"]
    barrier = threading.Barrier(16)

    def wait_and_read(part: int) -> bytes:
        if part < 16:
            barrier.wait(10)
            expiring.expired = {keys["reader"][0]}
        return _read(storage, part)

    with ThreadPoolExecutor(16) as pool:
        parts = list(pool.map(wait_and_read, range(64)))

    assert CONTENT[:10_000] == before
    assert CONTENT == b"".join(parts)
    assert 2 == len(services.requests)
    assert 1 <= expiring.refused <= 16
    assert keys["admin"][0][-4:] in storage.credentials()


@pytest.mark.parametrize("from_role", ["container"], indirect=True)
def test_each_expiry_has_a_renewal_of_its_own(
    from_role: dict[str, str | None],
    services: Any,
    keys: dict[str, tuple[str, str]],
    fronted: Callable[..., str],
    opened: Callable[..., S3Storage],
    put: Callable[..., str],
) -> None:
    """stat, list and read_into all go on, however often credentials run out."""
    put("expiry/object", CONTENT)
    expiring = Expiring()
    storage = opened(AWS_ENDPOINT_URL=fronted(expiring), **from_role)
    calls: list[Callable[[], object]] = [
        lambda: storage.stat("expiry/object").size,
        lambda: [info.path for info in storage.list("expiry")],
        lambda: _read(storage, 1),
    ]

    answers = []
    for generation, call in enumerate(calls, 1):
        answers.append(call())
        new, old = ("admin", "reader") if generation % 2 else ("reader", "admin")
        services.keys, expiring.expired = keys[new], {keys[old][0]}
        answers.append(call())
        assert generation + 1 == len(services.requests)

    assert [len(CONTENT)] * 2 + [["expiry/object"]] * 2 + [CONTENT[10_000:20_000]] * 2 == answers


@pytest.mark.parametrize("from_role", ["container"], indirect=True)
@pytest.mark.parametrize("headers", [{}, {"x-amz-bucket-region": "us-east-1"}], ids=["silent", "with the region"])
def test_a_head_that_is_refused_without_a_word(
    from_role: dict[str, str | None],
    services: Any,
    keys: dict[str, tuple[str, str]],
    fronted: Callable[..., str],
    opened: Callable[..., S3Storage],
    put: Callable[..., str],
    headers: dict[str, str],
) -> None:
    """A bare 400 may mean another region; where it does not, it means credentials."""
    put("expiry/object", CONTENT)
    expired = {keys["reader"][0]}
    url = fronted(lambda request: (400, headers, b"") if request.access_key in expired else None)
    storage = opened(AWS_ENDPOINT_URL=url, **from_role)
    assert keys["reader"][0][-4:] in storage.credentials()
    services.keys = keys["admin"]

    size = storage.stat("expiry/object").size

    assert len(CONTENT) == size
    assert 2 == len(services.requests)


@pytest.mark.parametrize("from_role", ["container"], indirect=True)
def test_a_listing_goes_on_at_its_page(
    from_role: dict[str, str | None],
    services: Any,
    keys: dict[str, tuple[str, str]],
    fronted: Callable[..., str],
    opened: Callable[..., S3Storage],
    client: Any,
) -> None:
    """Credentials that run out between two pages lose and repeat nothing."""
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: client.put_object(Bucket="models", Key=f"pages/{i:04}", Body=b""), range(1005)))
    expiring = Expiring()
    storage = opened(AWS_ENDPOINT_URL=fronted(expiring), **from_role)

    listing = storage.list("pages")
    paths = [next(listing).path]
    services.keys, expiring.expired = keys["admin"], {keys["reader"][0]}
    paths += [info.path for info in listing]

    assert [f"pages/{i:04}" for i in range(1005)] == paths
    assert 2 == len(services.requests)


@pytest.mark.parametrize("from_role", ["web identity"], indirect=True)
def test_a_load_goes_on_with_other_credentials(
    from_role: dict[str, str | None],
    services: Any,
    server: SeaweedFS,
    keys: dict[str, tuple[str, str]],
    fronted: Callable[..., str],
    put: Callable[..., str],
) -> None:
    """A load whose credentials run out on the way is right, and counts no retry: nothing waits for it."""
    weights = {f"weight.{i}": torch.full((500_000,), float(i)) for i in range(20)}
    put("expiry/model/model.safetensors", save(weights))
    expiring = Expiring()
    seen = 0

    def answer(request: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == 5:
            services.keys, expiring.expired = keys["admin"], {keys["reader"][0]}
        return expiring(request)

    variables = {**server.environ(), **from_role, "AWS_ENDPOINT_URL": fronted(answer), "MX_CHUNK_BYTES": "1000000"}
    environ = {name: value for name, value in variables.items() if value is not None}
    model = {name: torch.zeros_like(tensor) for name, tensor in weights.items()}

    report = mx.load_into(model, "s3://models/expiry/model", environ=environ)

    assert all(torch.equal(tensor, model[name]) for name, tensor in weights.items())
    assert expiring.refused
    assert 2 == len(services.requests)
    assert 0 == report.retries


@pytest.mark.parametrize("from_role", ROLES, indirect=True)
def test_new_credentials_that_are_refused_too(
    from_role: dict[str, str | None],
    services: Any,
    keys: dict[str, tuple[str, str]],
    fronted: Callable[..., str],
    opened: Callable[..., S3Storage],
    put: Callable[..., str],
) -> None:
    """There is one renewal, then the load ends with what happened."""
    put("expiry/object", CONTENT)
    expiring = Expiring()
    storage = opened(AWS_ENDPOINT_URL=fronted(expiring), **from_role)
    _read(storage, 0)
    services.keys, expiring.expired = keys["admin"], {key for key, _ in keys.values()}

    with pytest.raises(AccessDeniedError, match="ExpiredToken") as caught:
        _read(storage, 0)

    assert not caught.value.retryable
    assert "new credentials were fetched" in str(caught.value)
    assert "clock" in str(caught.value)
    assert 2 == len(services.requests)


@pytest.mark.parametrize("from_role", ROLES, indirect=True)
def test_the_same_credentials_again(
    from_role: dict[str, str | None],
    services: Any,
    keys: dict[str, tuple[str, str]],
    fronted: Callable[..., str],
    opened: Callable[..., S3Storage],
    put: Callable[..., str],
) -> None:
    """Where the place has no others, it is asked once for all reads, and no request is sent a second time."""
    put("expiry/object", CONTENT)
    expiring = Expiring()
    storage = opened(AWS_ENDPOINT_URL=fronted(expiring), **from_role)
    _read(storage, 0)
    expiring.expired = {keys["reader"][0]}

    def refused(part: int) -> str:
        with pytest.raises(AccessDeniedError) as caught:
            _read(storage, part)
        return str(caught.value)

    with ThreadPoolExecutor(8) as pool:
        messages = list(pool.map(refused, range(8)))

    assert all("which still gives the same" in message for message in messages)
    assert 2 == len(services.requests)
    assert 8 == expiring.refused


@pytest.mark.parametrize("from_role", ["container"], indirect=True)
def test_a_renewal_that_fails_is_shared(
    from_role: dict[str, str | None],
    services: Any,
    keys: dict[str, tuple[str, str]],
    fronted: Callable[..., str],
    opened: Callable[..., S3Storage],
    put: Callable[..., str],
) -> None:
    """An agent that does not answer is asked once for all reads that wait; a later try finds it in order again."""
    put("expiry/object", CONTENT)
    expiring = Expiring()
    together = threading.Barrier(8)

    def answer(request: Any) -> Any:
        refused = expiring(request)
        if refused is not None and services.refusal is not None:
            together.wait(10)
        return refused

    storage = opened(AWS_ENDPOINT_URL=fronted(answer), **from_role)
    _read(storage, 0)
    services.keys, services.refusal, services.delay_seconds = keys["admin"], (503, {}, b""), 0.3
    expiring.expired = {keys["reader"][0]}

    def failed(part: int) -> AccessDeniedError:
        with pytest.raises(AccessDeniedError, match="HTTP 503") as caught:
            _read(storage, part)
        return caught.value

    with ThreadPoolExecutor(8) as pool:
        errors = list(pool.map(failed, range(8)))
    asked = len(services.requests)
    services.refusal, services.delay_seconds = None, 0.0

    assert all(error.retryable for error in errors)
    assert 1 + 3 == asked  # botocore asks an agent three times in a row
    assert CONTENT[:10_000] == _read(storage, 0)


def test_a_credentials_file_that_was_rewritten(
    keys: dict[str, tuple[str, str]],
    fronted: Callable[..., str],
    opened: Callable[..., S3Storage],
    put: Callable[..., str],
    tmp_path: Path,
) -> None:
    """The file is read again for every operation that is refused, a HEAD (whose refusal says nothing) among them."""
    put("expiry/object", CONTENT)
    file = tmp_path / "credentials"

    def write(user: str) -> None:
        file.write_text("[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n".format(*keys[user]))

    expiring = Expiring("InvalidAccessKeyId", 403)
    write("reader")
    variables: dict[str, Any] = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}
    storage = opened(AWS_ENDPOINT_URL=fronted(expiring), AWS_SHARED_CREDENTIALS_FILE=str(file), **variables)
    _read(storage, 0)

    expiring.expired = {keys["reader"][0]}
    with pytest.raises(AccessDeniedError, match="which still gives the same"):
        _read(storage, 0)
    write("admin")
    assert CONTENT[:10_000] == _read(storage, 0)
    expiring.expired = {keys["admin"][0]}
    write("reader")
    assert len(CONTENT) == storage.stat("expiry/object").size


def test_keys_in_variables_are_never_looked_for_again(
    keys: dict[str, tuple[str, str]], fronted: Callable[..., str], opened: Callable[..., S3Storage]
) -> None:
    """They cannot have changed; the message says what to do with them."""
    expiring = Expiring()
    expiring.expired = {keys["admin"][0]}
    storage = opened(AWS_ENDPOINT_URL=fronted(expiring), AWS_SESSION_TOKEN="a-token")

    with pytest.raises(AccessDeniedError, match="get new ones and start the load again"):
        _read(storage, 0)

    assert 1 == expiring.refused


@pytest.mark.parametrize("from_role", ["metadata"], indirect=True)
def test_what_a_role_may_not_do_costs_no_renewal(
    from_role: dict[str, str | None], services: Any, opened: Callable[..., S3Storage]
) -> None:
    """A plain denial says nothing about the credentials."""
    storage = opened("s3://public", **from_role)

    with pytest.raises(AccessDeniedError, match="AccessDenied"):
        list(storage.list("any"))
    with pytest.raises(AccessDeniedError, match="HTTP 403"):
        storage.stat("any")

    assert ["metadata"] == services.requests
