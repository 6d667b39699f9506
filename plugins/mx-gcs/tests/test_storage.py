"""Listing, metadata and reads: what the emulator stores, and what servers could answer."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from typing import Any

import pytest

from devtools.fake_gcs import FakeGcs
from modelexpress_core.contracts.storage import ObjectInfo
from modelexpress_core.errors import BackendError, DeadlineError, NotFoundError, UnavailableError, UnsupportedError
from mx_gcs._storage import GcsStorage

Scripted = Callable[..., GcsStorage]


def answer(**content: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()


def item(name: str = "model/a", **fields: Any) -> dict[str, Any]:
    return {"name": name, "size": "7", "generation": "1", **fields}


# -- digests -----------------------------------------------------------------------------------------------------------


def test_listings_and_metadata_have_digests(emulated: Callable[..., GcsStorage], put: Callable[..., str]) -> None:
    """CRC32C and MD5 of the whole object, in hex. The CRC32C is the example of RFC 3720, appendix B.4."""
    content = bytes(range(32))
    generation = put("digests/object", content)
    digests = {"crc32c": "46dd794e", "md5": hashlib.md5(content).hexdigest()}
    expected = ObjectInfo("digests/object", 32, generation, digests)

    assert [expected] == list(emulated().list("digests"))
    assert expected == emulated().stat("digests/object")
    assert digests == dict(emulated().stat("digests/object").digests)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"crc32c": "AAAAAQ=="}, {"crc32c": "00000001"}),
        ({"crc32c": "AAAAAQ==", "md5Hash": f"{'A' * 22}=="}, {"crc32c": "00000001", "md5": "0" * 32}),
        ({}, {}),
        ({"crc32c": "no base64!", "md5Hash": "AAAAAQ=="}, {}),
        ({"crc32c": 5, "md5Hash": None}, {}),
    ],
)  # fmt: skip
def test_what_is_no_digest_is_passed_over(fields: dict[str, Any], expected: dict[str, str], scripted: Scripted) -> None:
    """Composite objects have no MD5."""
    assert expected == dict(scripted(answer(**item(**fields))).stat("model/a").digests)


# -- gzip --------------------------------------------------------------------------------------------------------------


def test_an_object_that_is_stored_compressed_is_refused(
    emulated: Callable[..., GcsStorage], put: Callable[..., str]
) -> None:
    """It is listed, since it may be a file that nothing reads; a read says what to do."""
    generation = put("compressed/object", b"\x1f\x8b, or so", contentEncoding="gzip")
    storage = emulated()

    assert ["compressed/object"] == [info.path for info in storage.list("compressed")]
    with pytest.raises(UnsupportedError, match="encoded: gzip") as caught:
        storage.read_into("compressed/object", 0, memoryview(bytearray(5)), version=generation)
    assert "without Content-Encoding" in str(caught.value.hint)


# -- requests ----------------------------------------------------------------------------------------------------------


def test_requests_have_only_what_they_need(
    google: Any, opened: Callable[..., GcsStorage], variables: Callable[[str], dict[str, str]], put: Callable[..., str]
) -> None:
    """Names are percent-encoded as a whole; reads expect a generation; no answer may be encoded."""
    name = "requests/a b/ü?#%2F&"
    generation = put(name, bytes(100))
    storage = opened(**variables("key"))

    storage.stat(name)
    storage.read_into(name, 10, memoryview(bytearray(5)), version=generation)
    storage.read_into(name, 10, memoryview(bytearray(5)), version=None)

    metadata, pinned, free = google.requests
    quoted = "requests%2Fa%20b%2F%C3%BC%3F%23%252F%26"
    assert metadata.path.startswith(f"/storage/v1/b/models/o/{quoted}?fields=")
    assert f"/download/storage/v1/b/models/o/{quoted}?alt=media&ifGenerationMatch={generation}" == pinned.path
    assert f"/download/storage/v1/b/models/o/{quoted}?alt=media" == free.path
    assert "bytes=10-14" == pinned.headers["Range"]
    assert {"identity"} == {request.headers["Accept-Encoding"] for request in google.requests}


def test_an_endpoint_may_have_a_path(serving: Any, opened: Callable[..., GcsStorage]) -> None:
    """A gateway of one's own, which passes requests on."""
    paths: list[str] = []

    def answered(request: Any) -> Any:
        paths.append(request.path.partition("?")[0])
        return answer(**item())

    with serving(answered) as url:
        opened(MX_GCS_ENDPOINT=f"{url}/gateway/", MX_GCS_ANONYMOUS="1").stat("model/a")

    assert ["/gateway/storage/v1/b/models/o/model%2Fa"] == paths


def test_reads_of_one_object_prepare_one_request(
    google: Any, opened: Callable[..., GcsStorage], variables: Callable[[str], dict[str, str]], put: Callable[..., str]
) -> None:
    """Each version of an object has its own, and so has each token."""
    first = put("prepared/object", b"1" * 100)
    storage = opened(**variables("key"))
    buffer = memoryview(bytearray(10))

    for offset in (0, 50, 90):
        storage.read_into("prepared/object", offset, buffer, version=first)
    second = put("prepared/object", b"2" * 100)
    storage.read_into("prepared/object", 0, buffer, version=second)

    assert b"2" * 10 == bytes(buffer)
    assert [first] * 3 + [second] == [request.query["ifGenerationMatch"] for request in google.requests]


def test_a_name_that_is_no_unicode(emulated: Callable[..., GcsStorage]) -> None:
    """A URI may have %80, which is none; there is no such object."""
    for call in (
        lambda: emulated().stat("requests/\udc80"),
        lambda: emulated().read_into("requests/\udc80", 0, memoryview(bytearray(5)), version="1"),
    ):
        with pytest.raises(BackendError):
            call()
    assert [] == list(emulated().list("requests/\udc80"))


# -- listing -----------------------------------------------------------------------------------------------------------


def test_directories_are_no_objects(emulated: Callable[..., GcsStorage], put: Callable[..., str]) -> None:
    """The console makes empty objects for folders, whose names end in a slash."""
    for name in ("folders/", "folders/a/", "folders/a/object"):
        put(name, b"")

    assert ["folders/a/object"] == [info.path for info in emulated().list("folders")]


def test_the_bucket_is_no_object(emulated: Callable[..., GcsStorage]) -> None:
    """And no request asks for it."""
    with pytest.raises(NotFoundError, match="a bucket is no object"):
        emulated().stat("")


def test_pages_follow_one_another(scripted: Scripted) -> None:
    """Each page is asked for with what the one before says."""
    tokens: list[str | None] = []

    def page(request: Any) -> Any:
        tokens.append(request.query.get("pageToken"))
        number = len(tokens)
        return answer(items=[item(f"model/{number}")], **({"nextPageToken": f"p {number}&"} if number < 3 else {}))

    assert ["model/1", "model/2", "model/3"] == [info.path for info in scripted(page).list("model")]
    assert [None, "p 1&", "p 2&"] == tokens


def test_an_empty_page_may_be_followed_by_others(scripted: Scripted) -> None:
    """GCS sends such pages where much was deleted."""

    def page(request: Any) -> Any:
        return answer(items=[item()]) if "pageToken" in request.query else answer(nextPageToken="p")

    assert ["model/a"] == [info.path for info in scripted(page).list("model")]


def test_the_same_page_again_is_an_error(scripted: Scripted) -> None:
    """A proxy that ignores the query would make a listing without end."""
    with pytest.raises(UnsupportedError, match="same page"):
        list(scripted(answer(items=[item()], nextPageToken="p")).list("model"))


def test_a_listing_without_end_is_given_up(serving: Any, opened: Callable[..., GcsStorage]) -> None:
    """By its time, which grows with its objects."""
    now, number = [0.0], [0]

    def page(_: Any) -> Any:
        number[0] += 1
        now[0] += 5
        return answer(items=[item()], nextPageToken=f"p{number[0]}")

    with serving(page) as url, contextlib.ExitStack():
        storage = opened(STORAGE_EMULATOR_HOST=url, MX_GCS_READ_TIMEOUT_SECONDS="1", clock=lambda: now[0])
        with pytest.raises(DeadlineError, match="has not ended after 15 s and 2 objects") as caught:
            list(storage.list("model"))

    assert not caught.value.retryable


@pytest.mark.parametrize(
    "content",
    [
        {"items": [item("elsewhere/a")]},
        {"items": [item("model")]},
        {"items": [item("model/a", size="-1")]},
        {"items": [item("model/a", size=7)]},
        {"items": [item("model/a", size="1" * 30)]},
        {"items": [item("model/a", generation="")]},
        {"items": [item("model/a", generation="1&alt=json")]},
        {"items": [item("")]},
        {"items": [item("model/\ud800")]},
        {"items": [{}]},
        {"items": ["model/a"]},
        {"items": "model/a"},
        {"items": [item()], "nextPageToken": 5},
    ],
)
def test_a_listing_of_another_form_is_refused(content: dict[str, Any], scripted: Scripted) -> None:
    """Nothing is taken from a server that does not speak the API."""
    with pytest.raises(UnsupportedError) as caught:
        list(scripted(answer(**content)).list("model"))

    assert "MX_GCS_ENDPOINT" in str(caught.value.hint)


@pytest.mark.parametrize("content", [b"", b"[]", b"<html>login</html>", b"[" * 100_000, b"\xff\xfe"])
def test_an_answer_that_is_not_of_the_api(content: bytes, scripted: Scripted) -> None:
    """A proxy's page with the status of success; it is not shown."""
    storage = scripted((200, {}, content))

    for call in (lambda: storage.stat("model/a"), lambda: list(storage.list("model"))):
        with pytest.raises(UnavailableError, match="not of the API of GCS") as caught:
            call()
        assert "login" not in str(caught.value)


def test_metadata_of_another_object_is_refused(scripted: Scripted) -> None:
    """A cache before the server that mixes up names."""
    with pytest.raises(UnsupportedError, match="another object"):
        scripted(answer(**item("model/b"))).stat("model/a")


@pytest.mark.parametrize("encoding", ["gzip", "br"])
def test_encoded_metadata_is_refused(encoding: str, scripted: Scripted) -> None:
    """No request accepts an encoding."""
    with pytest.raises(UnsupportedError, match=f"encoded: {encoding}"):
        scripted((200, {"Content-Encoding": encoding}, b"")).stat("model/a")


def test_pages_have_a_bound(scripted: Scripted) -> None:
    """A page that is longer than any of GCS is an error, and is not kept."""
    page = b'{"items": [' + b" " * (9 << 20) + b"]}"

    with pytest.raises(BackendError):
        list(scripted((200, {}, page)).list("model"))


# -- tools -------------------------------------------------------------------------------------------------------------


def test_the_emulator_keeps_generations_apart(server: FakeGcs) -> None:
    """What these tests rely on: each upload has a generation of its own."""
    assert server.put("tools/object", b"1") != server.put("tools/object", b"2")
