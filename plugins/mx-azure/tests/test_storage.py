"""What listings, sizes and reads give: directories, digests, versions, pages, and answers that cannot be used."""

from __future__ import annotations

import base64
import gzip
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from devtools.azurite import Azurite
from modelexpress_core.contracts.storage import Endpoint
from modelexpress_core.errors import (
    BackendError,
    DeadlineError,
    NotFoundError,
    SourceChangedError,
    UnavailableError,
    UnsupportedError,
)
from mx_azure._storage import AzureStorage
from tests.support.scripted_http import Answer, Request

CONTENT = bytes(range(256)) * 16
MD5 = hashlib.md5(CONTENT).digest()

Opened = Callable[..., AzureStorage]
Put = Callable[..., Any]


def page(*blobs: str, marker: str = "") -> Answer:
    body = f"<EnumerationResults><Blobs>{''.join(blobs)}</Blobs><NextMarker>{marker}</NextMarker></EnumerationResults>"
    return 200, {"Content-Type": "application/xml"}, f'\ufeff<?xml version="1.0" encoding="utf-8"?>{body}'.encode()


def blob(
    name: str, more: str = "", *, size: int = 7, etag: str = "0x1", kind: str = "BlockBlob", tail: str = ""
) -> str:
    properties = f"<Etag>{etag}</Etag><Content-Length>{size}</Content-Length><BlobType>{kind}</BlobType>{more}"
    name = name if name.startswith("<") else f"<Name>{name}</Name>"
    return f"<Blob>{name}<Properties>{properties}</Properties>{tail}</Blob>"


# -- directories -------------------------------------------------------------------------------------------------------


def test_entries_that_stand_for_directories_are_left_out(opened: Opened, put: Put) -> None:
    """Tools make them on accounts without a hierarchy too, with this metadata; a blob of their name stays."""
    put("folders/model", b"", metadata={"hdi_isfolder": "true"})
    put("folders/model/weights", CONTENT)
    put("folders/other", b"", metadata={"hdi_isfolder": "false"})
    put("folders/slash/", b"")
    storage = opened()

    assert ["folders/model/weights", "folders/other"] == sorted(info.path for info in storage.list("folders"))
    with pytest.raises(NotFoundError, match="a directory is no blob"):
        storage.stat("folders/model")
    assert 0 == storage.stat("folders/other").size


def test_made_up_listings_of_hierarchical_accounts(scripted: Callable[..., AzureStorage]) -> None:
    """Such accounts say what is a directory; the metadata of other tools counts in any case."""
    folder = "<Metadata><Hdi_IsFolder>true</Hdi_IsFolder></Metadata>"
    storage = scripted(
        page(
            blob("a", "<ResourceType>directory</ResourceType>", size=0),
            blob("a/b", "<ResourceType>file</ResourceType>"),
            blob("c", tail=folder, size=0),
        )
    )

    assert ["a/b"] == [info.path for info in storage.list("")]


def test_made_up_names_that_xml_cannot_hold(scripted: Callable[..., AzureStorage]) -> None:
    """The service encodes them, and says so."""
    storage = scripted(page(blob('<Name Encoded="true">a%EF%BF%BEb%2525</Name>'), blob("c%25")))

    assert ["a\ufffeb%25", "c%25"] == [info.path for info in storage.list("")]


# -- digests -----------------------------------------------------------------------------------------------------------


def test_the_md5_of_a_blob_is_published(opened: Opened, put: Put) -> None:
    """By stat and by list, so that no load asks for it again."""
    put("digests/object", CONTENT)
    storage = opened()

    (listed,) = storage.list("digests")

    assert {"md5": MD5.hex()} == dict(listed.digests) == dict(storage.stat("digests/object").digests)


@pytest.mark.parametrize("kind", ["AppendBlob", "PageBlob"])
def test_the_md5_of_other_blobs_is_ignored(opened: Opened, put: Put, kind: str) -> None:
    """They keep the one of their creation, whatever is written."""
    name = f"digests-{kind}/object"
    put(name, bytes(512), blob_type=kind, content_settings=_content_settings(MD5))
    storage = opened()

    (listed,) = storage.list(f"digests-{kind}")

    assert {} == dict(listed.digests) == dict(storage.stat(name).digests)


def _content_settings(md5: bytes) -> Any:
    from azure.storage.blob import ContentSettings

    return ContentSettings(content_md5=bytearray(md5))


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        # CRC-64/NVME of "123456789" is 0xae8b14860a799888; the service writes the lowest byte first.
        ({"x-ms-content-crc64": base64.b64encode(bytes.fromhex("8898790a86148bae")).decode()}, "ae8b14860a799888"),
        ({"x-ms-content-crc64": "AAAA"}, None),
        ({}, None),
    ],
)
def test_a_made_up_crc64(scripted: Callable[..., AzureStorage], header: dict[str, str], expected: str | None) -> None:
    """Azure's CRC64 is CRC-64/NVME."""
    headers = {"Content-Length": "9", "ETag": '"x"', "x-ms-blob-type": "BlockBlob", **header}

    digests = scripted((200, headers, b"")).stat("object").digests

    assert expected == digests.get("crc64nvme")


# -- versions and answers ----------------------------------------------------------------------------------------------


def test_a_blob_that_is_replaced_ends_the_read(opened: Opened, put: Put) -> None:
    """By the condition, on the server."""
    put("versions/object", CONTENT)
    storage = opened()
    version = storage.stat("versions/object").version
    put("versions/object", CONTENT[::-1])

    with pytest.raises(SourceChangedError, match="ConditionNotMet"):
        storage.read_into("versions/object", 0, memoryview(bytearray(9)), version=version)


def test_a_blob_that_is_deleted_is_not_found(opened: Opened, put: Put, client: Any) -> None:
    """The server answers 412 to the read, so the error needs a second look; it is still about the read."""
    put("versions/gone", CONTENT)
    storage = opened()
    version = storage.stat("versions/gone").version
    client.get_blob_client("models", "versions/gone").delete_blob()

    with pytest.raises(NotFoundError, match="could not read bytes 0-8") as caught:
        storage.read_into("versions/gone", 0, memoryview(bytearray(9)), version=version)

    assert "BlobNotFound" in str(caught.value)


def test_a_server_that_ignores_the_condition(fronted: Callable[..., AzureStorage], put: Put) -> None:
    """The ETag of the answer is compared."""
    put("versions/ignored", CONTENT)

    def without_condition(request: Request) -> Answer | None:
        if request.headers.get("If-Match") is None:
            return None
        return 206, {"Content-Range": "bytes 0-8/4096", "ETag": '"other"'}, CONTENT[:9]

    with pytest.raises(SourceChangedError, match="If-Match was ignored"):
        fronted(without_condition).read_into("versions/ignored", 0, memoryview(bytearray(9)), version='"mine"')


def test_a_blob_that_is_stored_encoded_is_refused(opened: Opened, put: Put) -> None:
    """Its bytes are not those of a checkpoint."""
    from azure.storage.blob import ContentSettings

    packed = gzip.compress(CONTENT)
    put("encoded/object", packed, content_settings=ContentSettings(content_encoding="gzip"))
    storage = opened()
    info = storage.stat("encoded/object")

    assert len(packed) == info.size
    with pytest.raises(UnsupportedError, match="encoded: gzip") as caught:
        storage.read_into("encoded/object", 0, memoryview(bytearray(9)), version=info.version)
    assert "without Content-Encoding" in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "error", "says"),
    [
        ((200, {"Content-Length": "9"}, b""), UnsupportedError, "no ETag"),
        ((200, {"ETag": '"x"', "Transfer-Encoding": "chunked"}, b""), UnavailableError, "broke"),
    ],
)
def test_made_up_sizes_that_cannot_be_used(
    scripted: Callable[..., AzureStorage], answer: Answer, error: type[BackendError], says: str
) -> None:
    """Neither a version nor a size is guessed."""
    if "Transfer-Encoding" in answer[1]:
        answer = (answer[0], {**answer[1], "Content-Length": "many"}, b"")

    with pytest.raises(error, match=says):
        scripted(answer).stat("object")


# -- listings ----------------------------------------------------------------------------------------------------------


def test_pages_follow_their_markers(scripted: Callable[..., AzureStorage]) -> None:
    """Empty pages in between, too, which the service sends."""
    pages = {"": page(blob("a"), marker="1 &amp;"), "1 &": page(marker="2"), "2": page(blob("b"))}
    asked = []

    def answer(request: Request) -> Answer:
        query = parse_qs(urlsplit(request.path).query)
        asked.append(query)
        return pages[query.get("marker", [""])[0]]

    assert ["a", "b"] == [info.path for info in scripted(answer).list("dir")]
    assert {("dir/",)} == {tuple(query["prefix"]) for query in asked}
    assert {("1000",)} == {tuple(query["maxresults"]) for query in asked}


def test_the_same_page_again_is_an_error(scripted: Callable[..., AzureStorage]) -> None:
    """A proxy that ignores the marker would make a listing without end."""
    with pytest.raises(UnsupportedError, match="the same page"):
        list(scripted(page(blob("a"), marker="1")).list(""))


def test_pages_without_end_are_given_up(scripted: Callable[..., AzureStorage]) -> None:
    """By the time that they take."""
    numbers = itertools.count()
    clock: Iterator[float] = itertools.count(0, 10)  # type: ignore[assignment]  # of numbers
    storage = scripted(lambda _: page(marker=str(next(numbers))), clock=lambda: next(clock))

    with pytest.raises(DeadlineError, match="has not ended") as caught:
        list(storage.list(""))

    assert not caught.value.retryable
    assert next(numbers) < 50


@pytest.mark.parametrize(
    "content",
    [
        b"<html>Welcome to the hotel</html>",
        b"not XML",
        b"",
        b"<!DOCTYPE x [<!ENTITY a 'aaaa'>]><EnumerationResults><Blobs/></EnumerationResults>",
        b"<EnumerationResults><Blobs><Blob><Name>a</Name></Blob></Blobs></EnumerationResults>",
        b"<EnumerationResults><Blobs><Blob><Name/></Blob></Blobs></EnumerationResults>",
    ],
)
def test_answers_that_are_no_listing(scripted: Callable[..., AzureStorage], content: bytes) -> None:
    """Something in front of the server answers; it may be gone at the next try."""
    with pytest.raises(UnavailableError, match="no listing of the Blob service") as caught:
        list(scripted((200, {}, content)).list(""))

    assert "AZURE_STORAGE_ENDPOINT" in str(caught.value)


def test_a_listing_without_an_etag(scripted: Callable[..., AzureStorage]) -> None:
    """No version could be pinned."""
    with pytest.raises(UnsupportedError, match="no ETag"):
        list(scripted(page(blob("a", etag=""))).list(""))


def test_a_page_that_does_not_end_is_given_up(scripted: Callable[..., AzureStorage]) -> None:
    """Sixteen MiB are read of it."""
    with pytest.raises(UnavailableError):
        list(scripted((200, {}, b" " * ((16 << 20) + 1))).list(""))


# -- diagnosis ---------------------------------------------------------------------------------------------------------


def test_the_endpoint_is_where_requests_go(azurite: Azurite, opened: Opened) -> None:
    """Without a connection; with the proxy, without its password."""
    assert Endpoint("127.0.0.1", azurite.port, tls=False) == opened().endpoint()
    cloud = opened(
        AZURE_STORAGE_ENDPOINT=None, MX_AZURE_CA_BUNDLE=None, HTTPS_PROXY="http://me:s3cret@proxy.example.com:3128"
    )
    expected = Endpoint(
        "mxaccount.blob.core.windows.net", 443, tls=True, ca_bundle=None, proxy="http://proxy.example.com:3128"
    )
    assert expected == cloud.endpoint()
