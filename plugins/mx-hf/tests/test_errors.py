"""What the Hub's refusals mean: the class of the error, the cause, and the next step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import modelexpress_core as mx
from devtools.fake_hub import FakeHub, HubAnswer, HubRequest
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    NotFoundError,
    ThrottledError,
    UnavailableError,
)
from mx_hf._storage import HfStorage
from tests.support.network import CLOSED_PORT

TOKEN = "hf_aVeryGoodTokenForTheTests"
WEIGHTS = "model.safetensors"
CONTENT = b"weights" * 1000


@pytest.fixture(autouse=True)
def _weights(hub: FakeHub) -> None:
    hub.put("org/model", WEIGHTS, CONTENT)


def load(storage: HfStorage, prefix: str = "model") -> None:
    """List the files, and read the weights."""
    list(storage.list(prefix))
    info = storage.stat(f"{prefix}/{WEIGHTS}")
    storage.read_into(info.path, 0, memoryview(bytearray(100)), version=info.version)


def refused(storage: HfStorage, prefix: str = "model") -> tuple[BackendError, str]:
    """The error of a load, and all that it says."""
    with pytest.raises(BackendError) as caught:
        load(storage, prefix)
    error = caught.value
    return error, f"{error} {error.cause} {error.hint}"


def test_a_gated_repository_without_a_token(hub: FakeHub, on_hub: Callable[..., HfStorage]) -> None:
    """Accept the conditions, and set a token."""
    hub.repositories["org/model"].gated = True

    error, text = refused(on_hub())

    assert isinstance(error, AccessDeniedError)
    assert not error.retryable
    assert all(word in text for word in ("gated", "carries no token", "accept its conditions", "HF_TOKEN", WEIGHTS))


def test_a_gated_repository_with_a_token_that_has_no_access(hub: FakeHub, on_hub: Callable[..., HfStorage]) -> None:
    """Accept the conditions, or check the token's rights."""
    hub.repositories["org/model"].gated = True

    error, text = refused(on_hub(HF_TOKEN=TOKEN))

    assert isinstance(error, AccessDeniedError)
    assert all(word in text for word in ("GatedRepo", "has not been granted access", "rights of the token"))
    assert TOKEN not in text


def test_a_gated_repository_with_access_is_read(hub: FakeHub, on_hub: Callable[..., HfStorage]) -> None:
    """As any other."""
    hub.repositories["org/model"].gated = True
    hub.repositories["org/model"].readers.add(TOKEN)

    load(on_hub(HF_TOKEN=TOKEN))


@pytest.mark.parametrize("token", ["", TOKEN])
@pytest.mark.parametrize("kind", ["missing", "private"])
def test_a_missing_or_private_repository(hub: FakeHub, opened: Callable[..., HfStorage], kind: str, token: str) -> None:
    """The Hub does not tell them apart; the message names both, and the next step."""
    hub.repositories["org/model"].private = True
    uri = "hf://org/nothing" if kind == "missing" else "hf://org/model"
    variables = {**hub.environ(), **({"HF_TOKEN": token} if token else {})}

    error, text = refused(opened(uri, **variables), uri.rpartition("/")[2])

    assert isinstance(error, NotFoundError)
    assert all(word in text for word in ("misspelt", "private", uri))
    assert ("may not read it" if token else "carries no token") in text


def test_a_missing_revision(on_hub: Callable[..., HfStorage]) -> None:
    """It is not the repository that is missing."""
    error, text = refused(on_hub("hf://org/model?revision=v9"))

    assert isinstance(error, NotFoundError)
    assert all(word in text for word in ("RevisionNotFound", "?revision=", "revision=v9"))


def test_a_missing_commit(on_hub: Callable[..., HfStorage]) -> None:
    """Likewise, where nothing has to be resolved."""
    error, text = refused(on_hub(f"hf://org/model?revision={'9' * 40}"))

    assert isinstance(error, NotFoundError)
    assert "RevisionNotFound" in text


def test_a_missing_file(on_hub: Callable[..., HfStorage]) -> None:
    """Its repository and commit are named."""
    with pytest.raises(NotFoundError, match=r"no such file in org/model at the commit [0-9a-f]{40}"):
        on_hub().stat("model/nothing.safetensors")


def test_a_disabled_repository(hub: FakeHub, on_hub: Callable[..., HfStorage]) -> None:
    """By the Hub's words: it has no code for it."""
    hub.repositories["org/model"].disabled = True

    error, text = refused(on_hub(HF_TOKEN=TOKEN))

    assert isinstance(error, AccessDeniedError)
    assert "the Hub has disabled the repository" in text


def test_a_token_that_the_hub_does_not_know(on_hub: Callable[..., HfStorage]) -> None:
    """Make a new one; it is not shown."""
    error, text = refused(on_hub(HF_TOKEN="hf_unknown"))

    assert isinstance(error, AccessDeniedError)
    assert "revoked or has run out" in text
    assert "hf_unknown" not in text


def test_words_of_the_hub_are_quoted_without_secrets(hub: FakeHub, on_hub: Callable[..., HfStorage]) -> None:
    """A server may repeat the token, or write several lines."""
    words = f"No access with {TOKEN} by Bearer abcdef"
    hub.before = lambda _: (403, {"X-Error-Message": words}, b"")

    _, text = refused(on_hub(HF_TOKEN=TOKEN))

    assert "No access with ***" in text
    assert TOKEN not in text
    assert "abcdef" not in text


@pytest.mark.parametrize("server", ["hub", "cdn"])
@pytest.mark.parametrize("status", [400, 401, 403, 404, 407, 408, 410, 412, 416, 418, 429, 451, 500, 501, 503, 505])
def test_every_refusal_has_its_points(hub: FakeHub, on_hub: Callable[..., HfStorage], server: str, status: int) -> None:
    """Object, operation, what came back, likely cause and next step, whatever the status."""
    hub.before = lambda request: (status, {}, b"") if request.server == server else None

    error, text = refused(on_hub(HF_TOKEN=TOKEN))

    assert error.uri.startswith("hf://org/model")
    assert "mx-hf" == error.provider
    assert error.operation in {"list the files", "find the content", "read bytes 0-99"}
    assert f"HTTP {status}" in text
    assert error.cause
    assert error.hint
    assert TOKEN not in text


# -- limits ------------------------------------------------------------------------------------------------------------


def limited(**headers: str) -> HubAnswer:
    return 429, headers, b"Too Many Requests"


@pytest.mark.parametrize("kind", ["revision", "tree", "resolve"])
def test_a_rate_limit_says_how_long(hub: FakeHub, on_hub: Callable[..., HfStorage], kind: str) -> None:
    """Core waits as long as the header ``RateLimit`` says, which has no form of ``Retry-After``."""
    policy = '"fixed window";"resolvers";q=3000;w=300'
    answer = limited(**{"RateLimit": '"resolvers";r=0;t=55', "RateLimit-Policy": policy})
    hub.before = lambda request: answer if f"/{kind}/" in request.path else None

    error, text = refused(on_hub())

    assert isinstance(error, ThrottledError)
    assert (True, 55.0) == (error.retryable, error.retry_after_seconds)
    assert all(word in text for word in ("HTTP 429", "'resolvers'", "55 s", "HF_TOKEN"))


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "7", "RateLimit": '"api";r=0;t=55'}, 7.0),
        ({"RateLimit": '"api";r=12;t=55'}, None),
        ({"RateLimit": "nonsense"}, None),
        ({"RateLimit": '"api";r=0;t=99999999999999'}, None),
    ],
)
def test_other_limits(
    hub: FakeHub, on_hub: Callable[..., HfStorage], headers: dict[str, str], expected: float | None
) -> None:
    """``Retry-After`` counts first; a limit that is not used up says nothing; nonsense is ignored."""
    hub.before = lambda _: limited(**headers)

    error, _ = refused(on_hub())

    assert isinstance(error, ThrottledError)
    assert expected == error.retry_after_seconds


def test_a_load_waits_for_a_rate_limit(hub: FakeHub) -> None:
    """As long as the Hub says, within its budget of waiting; then it is complete."""
    hub.put("org/model", "model.safetensors", b"\x02\0\0\0\0\0\0\0{}")
    refusals = iter([limited(RateLimit='"api";r=0;t=0')] * 2)

    def before(request: HubRequest) -> HubAnswer | None:
        return next(refusals, None) if "/tree/" in request.path else None

    hub.before = before

    assert {} == mx.load_state_dict("hf://org/model", environ=hub.environ())


def test_a_rate_limit_longer_than_the_budget_fails_at_once(hub: FakeHub) -> None:
    """With the time in the message, instead of waiting in vain."""
    hub.before = lambda _: limited(RateLimit='"api";r=0;t=3000')

    with pytest.raises(ThrottledError, match="3000 s"):
        mx.load_state_dict("hf://org/model", environ={**hub.environ(), "MX_RETRY_BUDGET_SECONDS": "1"})


# -- the CDN -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_cdn_that_refuses_each_signature(hub: FakeHub, on_hub: Callable[..., HfStorage], status: int) -> None:
    """The URL is found once more, and then it is an error that names the CDN, and not the URL."""
    hub.before = lambda request: (status, {}, b"Signature=s3cret") if request.server == "cdn" else None

    _, text = refused(on_hub(HF_TOKEN=TOKEN))

    assert f"the CDN {hub.cdn_url} answered HTTP {status}" in text
    assert "Signature" not in text
    assert 2 == len([request for request in hub.requests if "/resolve/" in request.path])


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_cdn_with_a_passing_fault(hub: FakeHub, on_hub: Callable[..., HfStorage], status: int) -> None:
    """Core may try again; the URL is kept."""
    hub.before = lambda request: (status, {}, b"") if request.server == "cdn" else None

    error, _ = refused(on_hub())

    assert error.retryable
    assert 1 == len([request for request in hub.requests if "/resolve/" in request.path])


def test_a_cdn_that_cannot_be_reached(hub: FakeHub, on_hub: Callable[..., HfStorage]) -> None:
    """The error names it, and not the Hub, which answered: a firewall may let only that pass."""
    location = {"Location": f"http://127.0.0.1:{CLOSED_PORT}/x", "X-Linked-Etag": hub.digest_of("org/model", WEIGHTS)}
    hub.before = lambda request: (302, location, b"") if "/resolve/" in request.path else None

    error, text = refused(on_hub())

    assert isinstance(error, UnavailableError)
    assert f"the endpoint http://127.0.0.1:{CLOSED_PORT} refused the connection" in text


def test_a_server_that_is_no_hub(hub: FakeHub, on_hub: Callable[..., HfStorage]) -> None:
    """A captive portal, for example."""
    hub.before = lambda _: (200, {}, b"<html>Welcome</html>")

    error, text = refused(on_hub())

    assert isinstance(error, UnavailableError)
    assert "not of the API of the Hub" in text
    assert "HF_ENDPOINT" in text


# -- offline -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_sends_no_request(hub: FakeHub, on_hub: Callable[..., HfStorage], variable: str) -> None:
    """The error says which variable it is."""
    storage = on_hub(**{variable: "1"})
    error, text = refused(storage)

    assert isinstance(error, UnavailableError)
    assert not error.retryable
    assert "HF_HUB_OFFLINE" in text
    with pytest.raises(UnavailableError, match="no request was sent"):
        storage.read_into(f"model/{WEIGHTS}", 0, memoryview(bytearray(1)), version=f"{'1' * 40}/{'2' * 40}")
    assert [] == hub.requests


def test_offline_names_the_downloaded_copy(on_hub: Callable[..., HfStorage], tmp_path: Path) -> None:
    """The directory that huggingface_hub downloaded, for the branch, and for the commit."""
    commit = "1" * 40
    copy = tmp_path / "hub" / "models--org--model" / "snapshots" / commit
    copy.mkdir(parents=True)
    (tmp_path / "hub" / "models--org--model" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--model" / "refs" / "main").write_text(commit)

    for uri in ("hf://org/model", f"hf://org/model?revision={commit}"):
        _, text = refused(on_hub(uri, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)))
        assert f"load the downloaded copy: {copy}" in text
    _, text = refused(on_hub("hf://org/other", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path)), "other")
    assert "download org/other into" in text
