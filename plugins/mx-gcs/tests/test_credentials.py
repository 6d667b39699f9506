"""Each kind of credentials: valid, missing, wrong, refused by the service that gives tokens, and without rights."""

from __future__ import annotations

import json
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from devtools.http_proxy import HttpProxy
from modelexpress_core.errors import AccessDeniedError
from mx_gcs._storage import GcsStorage
from tests.support.network import CLOSED_PORT

Opened = Callable[..., GcsStorage]
Variables = Callable[[str], dict[str, str]]

KINDS = ["key", "login", "gcloud", "external", "external impersonated", "impersonated", "metadata"]
_EACH = pytest.mark.parametrize("kind", KINDS)


def refused(storage: GcsStorage, google: Any = None) -> AccessDeniedError:
    """The error of a request; it has cause and next step, and no secret."""
    with pytest.raises(AccessDeniedError) as caught:
        storage.stat("credentials/object")
    error = caught.value
    assert error.cause
    assert error.hint
    assert "gs://models/credentials/object" in str(error)
    if google is not None:
        secrets = (google.refresh_token, google.client_secret, google.subject_token, "ya29.", "BEGIN PRIVATE")
        assert [] == [secret for secret in secrets if secret in f"{error} {error!r}"]
    return error


# -- valid -------------------------------------------------------------------------------------------------------------


@_EACH
def test_each_kind_reads(kind: str, google: Any, variables: Variables, opened: Opened, put: Callable[..., str]) -> None:
    """Listing, metadata and reads carry a token that the right service gave."""
    generation = put("credentials/object", b"content")
    storage = opened(**variables(kind))
    buffer = bytearray(7)

    (listed,) = storage.list("credentials")
    assert listed == storage.stat("credentials/object")
    assert 7 == storage.read_into("credentials/object", 0, memoryview(buffer), version=generation)
    assert b"content" == buffer
    assert {google.given[-1]} == {request.token for request in google.requests}
    assert 3 == len(google.requests)


@_EACH
def test_each_kind_is_described(kind: str, google: Any, variables: Variables, opened: Opened) -> None:
    """One line says whose credentials they are and where they were found, without a secret."""
    text = opened(**variables(kind)).credentials()

    expected = {
        "key": f"service account {google.service_account}, in ",
        "login": "login of a user, in ",
        "gcloud": "(the login of gcloud)",
        "external": "external account //iam.googleapis.com/projects/1/",
        "external impersonated": f"external account {google.target}, in ",
        "impersonated": f"service account {google.target}, impersonated, in ",
        "metadata": f"service account {google.service_account}, from the metadata server 127.0.0.1:",
    }
    assert expected[kind] in text
    assert "ya29." not in text


@pytest.mark.parametrize("kind", ["key", "login", "external", "metadata"])
def test_a_service_account_can_be_impersonated(
    kind: str, google: Any, variables: Variables, tunnel: HttpProxy, opened: Opened, put: Callable[..., str]
) -> None:
    """Under Google's own host names, with certificates that are verified; delegates are passed on."""
    put("credentials/object", b"content")
    delegate = "delegate@project.iam.gserviceaccount.com"
    settings = {name: value for name, value in variables(kind).items() if name != "MX_GCS_ENDPOINT"}
    storage = opened(**settings, MX_GCS_IMPERSONATE_SERVICE_ACCOUNT=f"{delegate}, {google.target}")

    assert 7 == storage.stat("credentials/object").size
    assert f"service account {google.target}, impersonated with: " in storage.credentials()
    assert {"storage.googleapis.com:443", "iamcredentials.googleapis.com:443"} <= set(tunnel.tunnels)
    assert [{"key": "oauth", "login": "oauth", "external": "sts"}.get(kind, kind), "iam"] == google.asked
    assert [delegate] == google.forms[-1]["delegates"]


def test_the_metadata_server_is_reached_without_a_proxy(
    google: Any, variables: Variables, tunnel: HttpProxy, opened: Opened, put: Callable[..., str]
) -> None:
    """A proxy must not see tokens of the machine, and could not reach the server; GCS is reached through it."""
    put("credentials/object", b"content")
    settings = {name: value for name, value in variables("metadata").items() if name != "MX_GCS_ENDPOINT"}
    proxy = f"http://127.0.0.1:{tunnel.port}"

    assert 7 == opened(**settings, HTTP_PROXY=proxy, ALL_PROXY=proxy).stat("credentials/object").size
    assert ["metadata"] == google.asked
    assert ["storage.googleapis.com:443"] == tunnel.tunnels
    assert [] == tunnel.requests


def test_only_the_right_to_read_is_asked_for(google: Any, variables: Variables, opened: Opened) -> None:
    """A token that leaks cannot write."""
    opened(**variables("external impersonated")).credentials()

    assert ["https://www.googleapis.com/auth/devstorage.read_only"] == google.forms[-1]["scope"]


def test_the_file_goes_before_the_login_and_that_before_the_metadata_server(
    google: Any, variables: Variables, opened: Opened
) -> None:
    """As everywhere in Google Cloud."""
    both = {**variables("metadata"), **variables("gcloud")}

    opened(**both).credentials()
    assert ["oauth"] == google.asked

    opened(**{**both, **variables("external")}).credentials()
    assert ["oauth", "sts"] == google.asked


def test_the_process_environment_is_read_behind_the_settings(
    google: Any, variables: Variables, opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is passed to a load goes first; Google's own variables count where it names none."""
    settings = variables("key")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", settings["GOOGLE_APPLICATION_CREDENTIALS"])

    opened(MX_GCS_ENDPOINT=google.url).credentials()

    assert ["oauth"] == google.asked
    absent = opened(MX_GCS_ENDPOINT=google.url, GOOGLE_APPLICATION_CREDENTIALS="/absent.json")
    assert "/absent.json" in str(refused(absent))


# -- the project that pays ---------------------------------------------------------------------------------------------


def test_the_project_of_a_login_is_sent(google: Any, variables: Variables, opened: Opened) -> None:
    """As Google's tools do: the quota project that gcloud wrote into the file."""
    list(opened(**variables("login")).list("credentials"))

    (request,) = google.requests
    assert "the-quota-project" == request.headers["X-Goog-User-Project"]
    assert "userProject" not in request.query


@pytest.mark.parametrize("name", ["MX_GCS_USER_PROJECT", "GOOGLE_CLOUD_QUOTA_PROJECT"])
def test_the_project_that_is_set_pays(
    name: str, google: Any, variables: Variables, opened: Opened, put: Callable[..., str]
) -> None:
    """In every request, in place of that of the credentials."""
    generation = put("credentials/object", b"content")
    storage = opened(**variables("login"), **{name: "my-project"})

    list(storage.list("credentials"))
    storage.stat("credentials/object")
    storage.read_into("credentials/object", 0, memoryview(bytearray(7)), version=generation)

    assert ["my-project"] * 3 == [request.query["userProject"] for request in google.requests]
    assert [None] * 3 == [request.headers["X-Goog-User-Project"] for request in google.requests]


# -- missing, unusable -------------------------------------------------------------------------------------------------


def test_no_credentials_anywhere(opened: Opened, google: Any) -> None:
    """The error says where they were looked for, and what to do for a public bucket."""
    error = refused(opened(MX_GCS_ENDPOINT=google.url))

    assert "no credentials were found" in str(error)
    assert "NO_GCE_CHECK" in str(error)
    assert "MX_GCS_ANONYMOUS=1" in str(error)
    assert [] == google.requests


def test_a_metadata_server_that_is_named_and_silent(opened: Opened, google: Any) -> None:
    """That of a new pod begins after the pod itself: the request may be tried again."""
    error = refused(
        opened(MX_GCS_ENDPOINT=google.url, NO_GCE_CHECK="false", GCE_METADATA_HOST=f"127.0.0.1:{CLOSED_PORT}")
    )

    assert error.retryable
    assert f"asked at 127.0.0.1:{CLOSED_PORT}" in str(error)


def test_another_server_in_place_of_the_metadata_server(opened: Opened, google: Any, serving: Any) -> None:
    """Any web server may answer there, and those of other clouds do; without its header, nothing is taken from it."""
    for status in (200, 404):
        with serving(lambda _, status=status: (status, {}, b"hello")) as url:
            host = url.removeprefix("http://")
            error = refused(opened(MX_GCS_ENDPOINT=google.url, NO_GCE_CHECK="false", GCE_METADATA_HOST=host))

        assert "what answers as the metadata server is none" in str(error)
        assert "GCE_METADATA_HOST" in str(error.hint)
        assert not error.retryable
    assert [] == google.requests


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "is not there"),
        (b"", "holds no JSON object"),
        (b"[" * 100_000, "holds no JSON object"),
        (b"x" * (2 << 20), "holds no JSON object"),
        (b'["a"]', "holds no JSON object"),
        (b"{}", "its type, 'None', is none of: service_account, "),
        (b'{"type": "something"}', "its type, 'something', is none of: "),
        (b'{"type": "service_account", "private_key": "s3cret"}', "no usable service_account"),
        (b'{"type": "authorized_user", "refresh_token": "s3cret"}', "no usable authorized_user"),
        (b'{"type": "external_account", "audience": "s3cret"}', "no usable external_account"),
        (b'{"type": "impersonated_service_account", "source_credentials": "s3cret"}', "no usable impersonated"),
    ],
)
def test_a_file_that_cannot_be_used(
    content: bytes | None, says: str, opened: Opened, google: Any, tmp_path: Path
) -> None:
    """The error names the file and the fault, and quotes nothing of it."""
    file = tmp_path / "credentials.json"
    if content is not None:
        file.write_bytes(content)

    error = refused(opened(MX_GCS_ENDPOINT=google.url, GOOGLE_APPLICATION_CREDENTIALS=str(file)))

    assert says in str(error)
    assert str(file) in str(error)
    assert "s3cret" not in str(error)
    assert not error.retryable


def test_a_directory_in_place_of_the_file(opened: Opened, google: Any, tmp_path: Path) -> None:
    """As a Kubernetes volume is, where the name of its file is forgotten."""
    error = refused(opened(MX_GCS_ENDPOINT=google.url, GOOGLE_APPLICATION_CREDENTIALS=str(tmp_path)))

    assert f"cannot be read: {tmp_path}" in str(error)


def test_the_token_of_a_workload_that_is_not_mounted(
    google: Any, variables: Variables, opened: Opened, tmp_path: Path
) -> None:
    """The error is about the credentials, and says that a volume may be missing."""
    settings = variables("external")
    (tmp_path / "subject").unlink()

    error = refused(opened(**settings))

    assert "external account" in str(error)
    assert [] == google.asked


def test_credentials_of_another_cloud(google: Any, variables: Variables, opened: Opened) -> None:
    """A token of one cloud is not sent to another."""
    error = refused(opened(**variables("key"), GOOGLE_CLOUD_UNIVERSE_DOMAIN="example.goog"))

    assert "googleapis.com" in str(error)
    assert "GOOGLE_CLOUD_UNIVERSE_DOMAIN" in str(error.hint)
    assert [] == google.asked


@pytest.mark.parametrize(("kind", "field"), [("key", "token_uri"), ("external", "token_url")])
def test_credentials_are_not_sent_unencrypted(
    kind: str, field: str, google: Any, variables: Variables, opened: Opened
) -> None:
    """A URL of the file with http:// and another host is refused before a connection."""
    settings = variables(kind)
    file = Path(settings["GOOGLE_APPLICATION_CREDENTIALS"])
    file.write_text(json.dumps({**json.loads(file.read_text()), field: "http://198.51.100.1/token"}))

    error = refused(opened(**settings), google)

    assert "unencrypted to 198.51.100.1" in str(error)


# -- wrong, refused ----------------------------------------------------------------------------------------------------


def json_answer(status: int, **content: Any) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def oauth(error: str, description: str = "", **more: str) -> tuple[int, dict[str, str], bytes]:
    return json_answer(400, error=error, error_description=description, **more)


def api(status: int, code: str, message: str, *reasons: str) -> tuple[int, dict[str, str], bytes]:
    details = [{"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": reason} for reason in reasons]
    return json_answer(status, error={"code": status, "status": code, "message": message, "details": details})


@pytest.mark.parametrize(
    ("kind", "asked", "answer", "says"),
    [
        ("key", "oauth", oauth("invalid_grant", "Invalid JWT Signature."), "key of the service account was deleted"),
        (
            "key",
            "oauth",
            oauth("invalid_grant", "Invalid JWT: Token must be a short-lived token (60 minutes) and in a reasonable "),
            "set the clock",
        ),
        ("key", "oauth", oauth("invalid_grant", "Invalid grant: account not found"), "service account was deleted"),
        ("login", "oauth", oauth("invalid_grant", "Token has been expired or revoked."), "application-default login"),
        ("login", "oauth", oauth("invalid_grant", "reauth", error_subtype="invalid_rapt"), "log in again"),
        ("login", "oauth", oauth("invalid_client", "The OAuth client was deleted."), "client of the login"),
        ("external", "sts", oauth("invalid_grant", "The ID Token issued at 1 is expired."), "renews the token's file"),
        ("external", "sts", oauth("invalid_target", "The target service does not exist."), "check the audience"),
        (
            "external",
            "sts",
            oauth("unauthorized_client", "The given credential is rejected by the attribute condition."),
            "attribute condition",
        ),
        (
            "external impersonated",
            "iam",
            api(403, "PERMISSION_DENIED", "Permission 'iam.serviceAccounts.getAccessToken' denied on resource"),
            "Service Account Token Creator",
        ),
        (
            "impersonated",
            "iam",
            api(403, "PERMISSION_DENIED", "IAM Service Account Credentials API has not been used", "SERVICE_DISABLED"),
            "gcloud services enable iamcredentials.googleapis.com",
        ),
        ("impersonated", "iam", api(404, "NOT_FOUND", "Gaia id not found"), "does not exist"),
        ("metadata", "metadata", (404, {}, b"not found"), "no service account"),
        (
            "metadata",
            "metadata",
            (403, {}, b"Unable to generate access token; IAM: Permission 'iam.serviceAccounts.getAccessToken' denied"),
            "Workload Identity User",
        ),
        ("key", "oauth", (400, {}, b"<html>s3cret</html>"), "HTTP 400"),
        ("key", "oauth", json_answer(400, error=["odd"]), "HTTP 400"),
    ],
)
def test_a_refusal_is_explained(
    kind: str, asked: str, answer: Any, says: str, google: Any, variables: Variables, opened: Opened
) -> None:
    """Each refusal names the service and the next step; it is asked once, and is final."""
    google.refusals[asked] = answer

    error = refused(opened(**variables(kind)), google)

    assert says in str(error)
    assert f" answered HTTP {answer[0]}" in str(error)
    assert "s3cret" not in str(error)
    assert not error.retryable
    assert google.asked.count(asked) == (2 if asked == "metadata" and answer[0] == 403 else 1)  # the address, the token
    assert [] == google.requests


@pytest.mark.parametrize(("kind", "asked"), [("key", "oauth"), ("external", "sts"), ("impersonated", "iam")])
@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_fault_is_left_to_core(
    kind: str, asked: str, status: int, google: Any, variables: Variables, opened: Opened
) -> None:
    """google-auth would wait and try again by itself; here one request fails, as one that may be tried again."""
    google.refusals[asked] = (status, {"Retry-After": "7"}, b"")

    error = refused(opened(**variables(kind)), google)

    assert error.retryable
    assert 1 == google.asked.count(asked)


def test_a_throttled_service_is_left_alone(google: Any, variables: Variables, opened: Opened) -> None:
    """For as long as it asks for: requests that come before that fail without another one."""
    google.refusals["oauth"] = (429, {"Retry-After": "7"}, b"")
    now = [100.0]
    storage = opened(**variables("key"), clock=lambda: now[0])

    assert [True, True] == [refused(storage).retryable for _ in range(2)]
    assert 1 == google.asked.count("oauth")
    now[0] += 8
    refused(storage)
    assert 2 == google.asked.count("oauth")


def test_a_wrong_refresh_token(google: Any, variables: Variables, opened: Opened) -> None:
    """The service judges it: no answer is made up for this one."""
    settings = variables("login")
    google.refresh_token = "another"

    assert "ran out or was revoked" in str(refused(opened(**settings), google))


def test_a_key_that_was_replaced(google: Any, variables: Variables, opened: Opened) -> None:
    """The signature is checked with the public key."""
    from cryptography.hazmat.primitives.asymmetric import rsa

    settings = variables("key")
    google.key = rsa.generate_private_key(public_exponent=65537, key_size=2048)

    assert "make a new key" in str(refused(opened(**settings), google))


def test_a_token_service_that_cannot_be_reached(google: Any, variables: Variables, opened: Opened) -> None:
    """It may be a passing fault."""
    settings = variables("key")
    file = Path(settings["GOOGLE_APPLICATION_CREDENTIALS"])
    url = f"http://127.0.0.1:{CLOSED_PORT}/token"
    file.write_text(json.dumps({**json.loads(file.read_text()), "token_uri": url}))

    error = refused(opened(**settings), google)

    assert error.retryable
    assert google.service_account in str(error)
    assert "ConnectionRefusedError" in str(error)


@pytest.mark.parametrize(
    ("kind", "asked", "answer"),
    [
        ("key", "oauth", json_answer(200, id_token="s3cret", expires_in=3600)),
        ("key", "oauth", json_answer(200, access_token="s3cret\nX-Other: 1", expires_in=3600)),
        ("key", "oauth", json_answer(200, access_token=["s3cret"], expires_in=3600)),
        ("key", "oauth", json_answer(200, access_token="s3cret", expires_in="soon")),
        ("key", "oauth", (200, {}, b"s3cret")),
        ("login", "oauth", json_answer(200, id_token="s3cret", refresh_token="s3cret")),
        ("external", "sts", json_answer(200, token="s3cret")),
        ("impersonated", "iam", json_answer(200, accessToken="s3cret", expireTime="soon")),
        ("metadata", "metadata", json_answer(200, access_token="s3cret")),
        ("metadata", "metadata", json_answer(200, access_token=5, expires_in=5)),
        ("metadata", "metadata", json_answer(200, access_token="s3cret\r\nX-Other: 1", expires_in=3600)),
        ("metadata", "metadata", (200, {}, b"s3cret")),
        ("metadata", "metadata", (200, {}, b"[" * 100_000)),
    ],
)
def test_an_answer_without_a_usable_token(  # a case and its parts
    kind: str, asked: str, answer: Any, google: Any, variables: Variables, opened: Opened
) -> None:
    """It is an error, neither whose message nor whose traceback has what was answered; GCS is not asked."""
    google.refusals[asked] = answer

    error = refused(opened(**variables(kind)), google)

    assert "s3cret" not in "".join(traceback.format_exception(error))
    assert [] == google.requests


def test_an_odd_name_of_a_service_account(google: Any, variables: Variables, opened: Opened) -> None:
    """What is no name is not shown."""
    google.service_account = "s3cret\r\nloader"

    error = refused(opened(**variables("metadata")), google)

    assert "s3cret" not in "".join(traceback.format_exception(error))


def test_a_redirect_of_a_token_service_is_not_followed(google: Any, variables: Variables, opened: Opened) -> None:
    """Credentials go to the named server alone."""
    google.refusals["oauth"] = (307, {"Location": f"{google.url}/elsewhere"}, b"")

    assert "HTTP 307" in str(refused(opened(**variables("key")), google))
    assert ["oauth"] == google.asked


# -- without rights ----------------------------------------------------------------------------------------------------


def test_without_the_right_to_list(google: Any, variables: Variables, opened: Opened, put: Callable[..., str]) -> None:
    """Reading a named object works; listing names the permission and the role."""
    put("credentials/object", b"content")
    google.rights = frozenset({"get"})
    storage = opened(**variables("key"))

    assert 7 == storage.stat("credentials/object").size
    with pytest.raises(AccessDeniedError, match=r"storage\.objects\.list") as caught:
        list(storage.list("credentials"))
    assert "Storage Object Viewer" in str(caught.value.hint)


def test_without_the_right_to_read(google: Any, variables: Variables, opened: Opened, put: Callable[..., str]) -> None:
    """Listing works; reading names the permission and the role, and fetches no other token."""
    generation = put("credentials/object", b"content")
    google.rights = frozenset({"list"})
    storage = opened(**variables("key"))

    assert ["credentials/object"] == [info.path for info in storage.list("credentials")]
    for read in (
        lambda: storage.stat("credentials/object"),
        lambda: storage.read_into("credentials/object", 0, memoryview(bytearray(7)), version=generation),
    ):
        with pytest.raises(AccessDeniedError, match=r"storage\.objects\.get") as caught:
            read()
        assert "Storage Object Viewer" in str(caught.value.hint)
    assert ["oauth"] == google.asked


def test_anonymous_requests_carry_nothing(google: Any, variables: Variables, opened: Opened) -> None:
    """Even where credentials are set; a bucket that is not public says what to do."""
    storage = opened(**variables("login"), MX_GCS_ANONYMOUS="1")

    error = refused(storage, google)

    assert "unset MX_GCS_ANONYMOUS" in str(error.hint)
    assert "MX_GCS_ANONYMOUS" in storage.credentials()
    assert [] == google.asked
    assert [None] == [request.headers["Authorization"] for request in google.requests]


def test_an_emulator_gets_no_token(google: Any, variables: Variables, opened: Opened) -> None:
    """As with Google's own library."""
    settings = {name: value for name, value in variables("key").items() if name != "MX_GCS_ENDPOINT"}

    refused(opened(**settings, STORAGE_EMULATOR_HOST=google.url), google)

    assert [] == google.asked
    assert [None] == [request.headers["Authorization"] for request in google.requests]


# -- tokens that run out -----------------------------------------------------------------------------------------------


def read_in_threads(storage: GcsStorage, generation: str, threads: int = 8, reads: int = 5) -> list[Exception]:
    """Read at once in many threads; the errors."""
    errors: list[Exception] = []
    begin = threading.Barrier(threads)

    def read() -> None:
        begin.wait()
        try:
            for _ in range(reads):
                buffer = bytearray(7)
                storage.read_into("credentials/object", 0, memoryview(buffer), version=generation)
                assert b"content" == buffer
        except Exception as exc:  # noqa: BLE001 - the test compares them
            errors.append(exc)

    running = [threading.Thread(target=read) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return errors


@pytest.mark.parametrize("kind", ["key", "external impersonated", "metadata"])
def test_a_token_that_is_refused_is_replaced_once_for_all(
    kind: str, google: Any, variables: Variables, opened: Opened, put: Callable[..., str]
) -> None:
    """It was revoked in the middle of a load: every read of every thread succeeds, and one other token is fetched."""
    generation = put("credentials/object", b"content")
    storage = opened(**variables(kind))
    storage.stat("credentials/object")
    google.tokens.clear()
    before = len(google.given)

    assert [] == read_in_threads(storage, generation)
    assert (2 if kind == "external impersonated" else 1) == len(google.given) - before


def test_listing_and_metadata_survive_a_refused_token(
    google: Any, variables: Variables, opened: Opened, put: Callable[..., str]
) -> None:
    """As reads do."""
    put("credentials/object", b"content")
    storage = opened(**variables("key"))
    for request in (lambda: storage.stat("credentials/object"), lambda: list(storage.list("credentials"))):
        request()
        google.tokens.clear()
        request()
    assert 3 == len(google.given)


def test_the_same_token_again_is_final(
    google: Any, variables: Variables, opened: Opened, put: Callable[..., str]
) -> None:
    """The metadata server keeps tokens: it is asked once more for all threads, not by each."""
    generation = put("credentials/object", b"content")
    google.keeps_tokens = True
    storage = opened(**variables("metadata"))
    storage.stat("credentials/object")
    google.tokens.clear()

    errors = read_in_threads(storage, generation)

    assert 8 == len(errors)
    assert all(isinstance(error, AccessDeniedError) and not error.retryable for error in errors)
    assert "is the same" in str(errors[0])
    assert 2 == google.asked.count("metadata")


def test_a_new_token_that_is_refused_too_is_final(
    google: Any, variables: Variables, opened: Opened, put: Callable[..., str]
) -> None:
    """No request is sent a third time."""
    put("credentials/object", b"content")
    storage = opened(**variables("key"))
    google.before = lambda request: google.checked(request) if google.tokens.clear() is None else None

    error = refused(storage, google)

    assert "HTTP 401, authError" in str(error)
    assert 2 == len(google.requests)


def test_a_failure_to_renew_is_shared(
    google: Any, variables: Variables, opened: Opened, put: Callable[..., str]
) -> None:
    """Threads that wait while one asks get its error, and do not ask one after the other."""
    generation = put("credentials/object", b"content")
    storage = opened(**variables("key"))
    storage.stat("credentials/object")
    google.tokens.clear()
    all_refused = threading.Barrier(8)

    def wait_for_all(request: Any) -> None:
        if request.token and request.token not in google.tokens:
            all_refused.wait(30)

    google.before = wait_for_all
    google.refusals["oauth"] = (503, {}, b"")

    errors = read_in_threads(storage, generation, threads=8)

    assert 8 == len(errors)
    assert all(isinstance(error, AccessDeniedError) and error.retryable for error in errors)
    assert 1 <= google.asked.count("oauth") - 1 < 8


def test_a_token_is_renewed_before_it_runs_out(
    google: Any, variables: Variables, opened: Opened, put: Callable[..., str]
) -> None:
    """Some minutes before; if that fails, the old one is used for as long as it is valid."""
    put("credentials/object", b"content")
    now = [100.0]
    storage = opened(**variables("key"), clock=lambda: now[0])
    storage.stat("credentials/object")
    now[0] += 3200
    storage.stat("credentials/object")
    assert 1 == len(google.given)

    google.refusals["oauth"] = (503, {}, b"")
    now[0] += 200
    storage.stat("credentials/object")
    storage.stat("credentials/object")
    assert 2 == google.asked.count("oauth")

    del google.refusals["oauth"]
    now[0] += 31
    storage.stat("credentials/object")
    storage.stat("credentials/object")
    assert 3 == google.asked.count("oauth")
    assert google.given[-1] == google.requests[-1].token


def test_a_token_that_had_run_out_already(google: Any, variables: Variables, opened: Opened) -> None:
    """The clock is wrong, or the service is stuck; GCS is not asked."""
    google.lifetime_seconds = -10

    error = refused(opened(**variables("key")), google)

    assert "already run out" in str(error)
    assert [] == google.requests


def test_a_file_that_was_replaced_is_read_again(
    google: Any, variables: Variables, opened: Opened, put: Callable[..., str]
) -> None:
    """A volume with a rotated key: the next token is fetched with the new one."""
    put("credentials/object", b"content")
    storage = opened(**variables("key"))
    storage.stat("credentials/object")
    google.tokens.clear()
    variables_of_login = variables("login")
    assert variables_of_login["GOOGLE_APPLICATION_CREDENTIALS"]  # the same file

    storage.stat("credentials/object")

    assert "login of a user" in storage.credentials()


def test_closing_ends_a_wait_for_a_token(google: Any, variables: Variables, opened: Opened) -> None:
    """A service that does not answer does not hold up the end of a load."""
    asked, release = threading.Event(), threading.Event()
    original = google.oauth

    def wait(form: dict[str, str]) -> Any:
        asked.set()
        release.wait(60)
        return original(form)

    google.oauth = wait
    storage = opened(**variables("key"))
    errors: list[Exception] = []

    def stat() -> None:
        try:
            storage.stat("credentials/object")
        except Exception as exc:  # noqa: BLE001 - the test looks at it
            errors.append(exc)

    thread = threading.Thread(target=stat)
    thread.start()
    assert asked.wait(30)
    storage.close()
    thread.join(10)
    ended = not thread.is_alive()
    release.set()
    thread.join()

    assert ended
    assert "was closed" in str(errors[0])
