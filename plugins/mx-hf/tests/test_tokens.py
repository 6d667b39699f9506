"""Where tokens are found, and that they go to the endpoint alone; which redirects are followed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from devtools.fake_hub import FakeHub, HubAnswer, HubRequest
from modelexpress_core.errors import (
    AccessDeniedError,
    BackendError,
    NotFoundError,
    SettingsError,
    UnavailableError,
    UnsupportedError,
)
from modelexpress_core.settings import describe
from mx_hf._storage import HfStorage
from mx_hf._tokens import Identity
from mx_hf.settings import HfSettings
from tests.support import scripted_http

TOKEN = "hf_aVeryGoodTokenForTheTests"
WEIGHTS = "model.safetensors"
CONTENT = b"weights" * 1000


@pytest.fixture
def private(hub: FakeHub) -> FakeHub:
    """The repository is private; the token may read it. It has a file in LFS, and one in git."""
    hub.put("org/model", WEIGHTS, CONTENT)
    hub.repositories["org/model"].private = True
    hub.repositories["org/model"].readers.add(TOKEN)
    return hub


def read(storage: HfStorage, path: str = f"model/{WEIGHTS}", size: int = len(CONTENT)) -> bytes:
    buffer = bytearray(size)
    assert size == storage.read_into(path, 0, memoryview(buffer), version=storage.stat(path).version)
    return bytes(buffer)


def told(error: BackendError) -> str:
    return f"{error} {error.cause} {error.hint}"


def test_the_token_goes_to_the_hub_alone(private: FakeHub, on_hub: Callable[..., HfStorage]) -> None:
    """Every request to the Hub carries it; none to the CDN does."""
    storage = on_hub(HF_TOKEN=TOKEN)
    list(storage.list("model"))

    assert CONTENT == read(storage)
    assert b"a model" == read(storage, "model/README.md", 7)
    assert {("hub", TOKEN), ("cdn", "")} == {(request.server, request.token) for request in private.requests}
    assert all(request.headers["User-Agent"].startswith("mx-hf/") for request in private.requests)


@pytest.mark.parametrize(
    "variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_HOME", "XDG_CACHE_HOME"]
)
def test_a_token_is_found_where_the_library_looks(
    private: FakeHub,
    on_hub: Callable[..., HfStorage],
    variable: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the variable, or the file of a login, whose place other variables name."""
    files = {"HF_TOKEN_PATH": "token", "HF_HOME": "home/token", "XDG_CACHE_HOME": "cache/huggingface/token"}
    value = TOKEN
    if variable in files:
        file = tmp_path / files[variable]
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{TOKEN}\n")
        value = str(file if variable == "HF_TOKEN_PATH" else tmp_path / files[variable].partition("/")[0])
    monkeypatch.delenv("HF_HOME")
    storage = on_hub(**{variable: value})

    assert CONTENT == read(storage)
    assert TOKEN not in storage.credentials()
    assert ("HF_TOKEN" if variable not in files else str(tmp_path / files[variable])) in storage.credentials()


def test_no_token_is_sent_where_the_user_says_so(private: FakeHub, on_hub: Callable[..., HfStorage]) -> None:
    """HF_HUB_DISABLE_IMPLICIT_TOKEN, as the library has it."""
    storage = on_hub(HF_TOKEN=TOKEN, HF_HUB_DISABLE_IMPLICIT_TOKEN="1")

    with pytest.raises(NotFoundError, match="RepoNotFound"):
        list(storage.list("model"))
    assert "HF_HUB_DISABLE_IMPLICIT_TOKEN" in storage.credentials()
    assert {""} == {request.token for request in private.requests}


def test_a_token_that_a_login_has_renewed_is_used(
    private: FakeHub, on_hub: Callable[..., HfStorage], tmp_path: Path
) -> None:
    """The Hub refuses the old one during a load; the file has another by then."""
    file = tmp_path / "token"
    file.write_text(TOKEN)
    storage = on_hub(HF_TOKEN_PATH=str(file))
    assert CONTENT == read(storage)

    private.tokens.clear()
    private.revoke_signatures()
    private.tokens.add("hf_renewed")
    private.repositories["org/model"].readers.add("hf_renewed")
    file.write_text("hf_renewed")

    assert CONTENT == read(storage)
    assert "hf_renewed" == private.requests[-2].token  # the last one went to the CDN


def test_the_library_reads_the_file_of_a_login(private: FakeHub, tmp_path: Path) -> None:
    """So that tokens of a login in the browser are renewed. In a process of its own: it reads variables at import."""
    (tmp_path / "token").write_text("hf_of_the_file")
    code = (
        "import huggingface_hub, os\n"
        "from mx_hf._tokens import Identity\n"
        "from mx_hf.settings import HfSettings\n"
        "from modelexpress_core.settings import from_env\n"
        "asked = []\n"
        "real = huggingface_hub.get_token\n"
        "huggingface_hub.get_token = lambda: asked.append(1) or real()\n"
        "print(dict(Identity(from_env(HfSettings, os.environ)).headers()), len(asked))\n"
    )
    environ = {**os.environ, **private.environ(), "HF_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=False, timeout=120
    )

    assert "{'Authorization': 'Bearer hf_of_the_file'} 1" == done.stdout.strip(), done.stderr


@pytest.mark.parametrize("value", ["hf_a\nX-Header: b", "hf_ü", "hf a", "x" * 9000])
def test_a_token_that_no_header_can_hold_is_refused(
    hub: FakeHub, on_hub: Callable[..., HfStorage], value: str, tmp_path: Path
) -> None:
    """Before any request, with its place and without its value."""
    (tmp_path / "token").write_text(value)
    for variables in ({"HF_TOKEN": value}, {"HF_TOKEN_PATH": str(tmp_path / "token")}):
        with pytest.raises(AccessDeniedError, match="no token can be sent") as caught:
            list(on_hub(**variables).list("model"))
        assert value not in told(caught.value)
    assert [] == hub.requests


def test_a_token_is_not_sent_unencrypted_to_another_machine(opened: Callable[..., HfStorage]) -> None:
    """Without one, an endpoint in the own network may be http."""
    storage = opened(HF_ENDPOINT="http://hub.internal.invalid", HF_TOKEN=TOKEN)

    with pytest.raises(AccessDeniedError, match="unencrypted") as caught:
        list(storage.list("model"))
    assert "HF_HUB_DISABLE_IMPLICIT_TOKEN" in told(caught.value)
    assert TOKEN not in told(caught.value)
    with pytest.raises(UnavailableError, match="does not resolve"):
        list(opened(HF_ENDPOINT="http://hub.internal.invalid").list("model"))


@pytest.mark.parametrize("endpoint", ["https://user:s3cret@hub.example", "https://hub.example?token=s3cret"])
def test_an_endpoint_with_credentials_is_refused(opened: Callable[..., HfStorage], endpoint: str) -> None:
    """Without showing them."""
    with pytest.raises(SettingsError) as caught:
        opened(HF_ENDPOINT=endpoint)

    assert "s3cret" not in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize(
    "endpoint", ["hub.example", "ftp://hub.example", "https://hüb.example", "https://a b", "https://[::1"]
)
def test_an_endpoint_that_is_no_url_is_refused(opened: Callable[..., HfStorage], endpoint: str) -> None:
    """With the name of the variable, and examples."""
    with pytest.raises(SettingsError, match="HF_ENDPOINT"):
        opened(HF_ENDPOINT=endpoint)


def test_settings_hide_the_token() -> None:
    """In ``repr``, and in ``mx settings``."""
    identity = Identity(HfSettings(token=TOKEN))  # type: ignore[call-arg]  # attrs

    assert identity.headers() == (("Authorization", f"Bearer {TOKEN}"),)
    assert TOKEN not in repr(describe(HfSettings, {"HF_TOKEN": TOKEN}, owner="mx-hf"))
    assert TOKEN not in repr(HfSettings(token=TOKEN))  # type: ignore[call-arg]


# -- redirects ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def another_server(requests: list[scripted_http.Request]) -> Iterator[str]:
    """A server that serves the content, whoever asks, and keeps the requests."""

    def answer(request: scripted_http.Request) -> scripted_http.Answer:
        requests.append(request)
        return 206, {"Content-Range": f"bytes 0-{len(CONTENT) - 1}/{len(CONTENT)}"}, CONTENT

    with scripted_http.serving(answer) as port:
        yield f"http://127.0.0.1:{port}"


def redirected(hub: FakeHub, kind: str, location: str) -> None:
    """Redirect requests of a kind to ``location``."""

    def before(request: HubRequest) -> HubAnswer | None:
        if f"/{kind}/" not in request.path:
            return None
        return 302, {"Location": location, "X-Linked-Etag": f'"{"0" * 64}"'}, b""

    hub.before = before


def test_an_api_that_redirects_to_another_server_gets_no_token_there(
    private: FakeHub, on_hub: Callable[..., HfStorage]
) -> None:
    """It is refused: metadata comes from the endpoint."""
    requests: list[scripted_http.Request] = []
    with another_server(requests) as url:
        for kind in ("revision", "tree"):
            redirected(private, kind, f"{url}/api/models/org/model")
            with pytest.raises(UnsupportedError, match=f"redirects to another server, {url}") as caught:
                list(on_hub(HF_TOKEN=TOKEN).list("model"))
            assert "HF_ENDPOINT" in told(caught.value)

    assert [] == requests


def test_a_redirect_of_the_cdn_is_followed_without_a_token(private: FakeHub, on_hub: Callable[..., HfStorage]) -> None:
    """And remembered: the next range goes to the last server at once."""
    requests: list[scripted_http.Request] = []
    storage = on_hub(HF_TOKEN=TOKEN)
    storage.stat(f"model/{WEIGHTS}")
    with another_server(requests) as url:
        redirected(private, "cdn", f"{url}/elsewhere")

        assert CONTENT == read(storage) == read(storage)

    assert ["/elsewhere"] * 2 == [request.path for request in requests]
    assert 1 == len([request for request in private.requests if request.server == "cdn"])
    assert all("Authorization" not in request.headers for request in requests)


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("http://cdn.example.invalid/file?Signature=s3cret", "without TLS, http://cdn.example.invalid"),
        ("ftp://cdn.example.invalid/file?Signature=s3cret", "no URL"),
        ("https://user:s3cret@cdn.example.invalid/file", "no URL"),
        ("https://cdn.example.invalid:99999/s3cret", "no URL"),
        ("https://[::1/s3cret", "no URL"),
        ("https://cdn.example.invalid/s3cret file", "no URL"),
        ("https://cdn.example.invalid/s3cret?" + "x" * 20_000, "very long"),
        ("", "names no URL"),
    ],
)
@pytest.mark.parametrize("kind", ["resolve", "cdn", "tree"])
def test_a_redirect_that_must_not_be_followed(
    private: FakeHub, on_hub: Callable[..., HfStorage], kind: str, location: str, words: str
) -> None:
    """To plain text on another machine, or to what is no URL. The message has the server at most."""
    storage = on_hub(HF_TOKEN=TOKEN)
    if kind != "tree":
        storage.stat(f"model/{WEIGHTS}")
    answer = {"Location": location, "X-Linked-Etag": f'"{private.digest_of("org/model", WEIGHTS)}"'}
    private.before = lambda request: (302, answer, b"") if f"/{kind}/" in request.path else None

    with pytest.raises(UnsupportedError) as caught:
        read(storage)

    assert words in str(caught.value)
    assert "s3cret" not in told(caught.value)
    assert TOKEN not in told(caught.value)


def test_redirects_without_end(private: FakeHub, on_hub: Callable[..., HfStorage]) -> None:
    """A few are followed, of the API, of the Hub's URLs of files, and of the CDN."""
    for kind in ("tree", "resolve"):
        storage = on_hub(HF_TOKEN=TOKEN)
        private.requests.clear()
        private.before = lambda request, kind=kind: (  # type: ignore[misc]
            (307, {"Location": f"{request.path}x"}, b"") if f"/{kind}/" in request.path else None
        )
        with pytest.raises(UnsupportedError, match="redirects follow each other"):
            read(storage)
        assert len(private.requests) < 12

    storage = on_hub(HF_TOKEN=TOKEN)
    private.requests.clear()
    private.before = lambda request: (307, {"Location": f"{request.path}x"}, b"") if "/cdn/" in request.path else None
    with pytest.raises(BackendError, match="HTTP 307"):
        read(storage)
    assert len(private.requests) < 12


def test_the_url_of_a_file_is_encoded(private: FakeHub, on_hub: Callable[..., HfStorage]) -> None:
    """Names of files, and of revisions, end no path and begin no query."""
    name = "odd name?#%41&é.safetensors"
    private.put("org/model", name, CONTENT, branch="a/branch")
    storage = on_hub("hf://org/model?revision=a/branch", HF_TOKEN=TOKEN)

    assert CONTENT == read(storage, f"model/{name}")
    assert any(request.path.endswith("/revision/a%2Fbranch") for request in private.requests)
    assert any(request.path.endswith(f"/{quote(name)}") for request in private.requests)


# -- who may read a repository -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["open", "gated", "private", "unknown"])
@pytest.mark.parametrize("at", ["", "?revision=main", "?revision=COMMIT"])
def test_whether_a_repository_is_restricted(hub: FakeHub, on_hub: Callable[..., HfStorage], kind: str, at: str) -> None:
    """Also with a pinned commit; a server that does not say so is not believed to be open."""
    repository = hub.repositories["org/model"]
    repository.gated, repository.private = kind == "gated", kind == "private"
    repository.readers.add(TOKEN)
    if kind == "unknown":
        hub.before = lambda request: (200, {}, b"{}") if request.query.get("expand") == "private" else None
    storage = on_hub(f"hf://org/model{at.replace('COMMIT', repository.branches['main'])}", HF_TOKEN=TOKEN)

    assert (kind != "open") == storage.is_restricted("model")
