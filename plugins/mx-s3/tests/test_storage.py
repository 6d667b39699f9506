"""S3Storage against a real S3 server, opened by its factory and through the plugin manager."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from awscrt import checksums

from devtools.seaweedfs import SeaweedFS
from modelexpress_core.contracts.storage import ObjectInfo, Storage
from modelexpress_core.errors import AccessDeniedError, NotFoundError, SourceChangedError
from modelexpress_core.plugins import STORAGE, PluginManager
from modelexpress_core.uri import ModelURI
from mx_s3._storage import S3Storage, open_s3

CONTENT = bytes(range(256)) * 4096


@pytest.fixture(scope="module")
def plugins() -> PluginManager:
    return PluginManager.discover({"MX_STRICT_PLUGINS": "1"})


@pytest.fixture(params=["factory", "plugin manager"])
def storage(request: pytest.FixtureRequest, server: SeaweedFS, plugins: PluginManager) -> Iterator[Storage]:
    uri = ModelURI.parse("s3://models/some/model")
    if request.param == "factory":
        storage: Storage = open_s3(uri, server.environ())
    else:
        _, storage = plugins.open(STORAGE, uri, server.environ())
    with contextlib.closing(storage):
        yield storage


def test_keeps_to_the_protocol(storage: Storage) -> None:
    """An S3Storage is a Storage."""
    assert isinstance(storage, Storage)


def test_lists_what_is_below_a_directory(storage: Storage, put: Callable[..., str]) -> None:
    """Objects below the prefix come with size and ETag; neighbours and directory markers do not come."""
    for key in ("list/dir/", "list/dir-2/other", "list/dirt"):
        put(key, b"")
    etags = {key: put(key, b"x" * size) for key, size in (("list/dir/a", 1), ("list/dir/b/c d+é", 2))}

    expected = [
        ObjectInfo("list/dir/a", 1, etags["list/dir/a"]),
        ObjectInfo("list/dir/b/c d+é", 2, etags["list/dir/b/c d+é"]),
    ]
    for prefix in ("list/dir", "list/dir/"):
        assert expected == sorted(storage.list(prefix), key=lambda info: info.path)


def test_lists_nothing_where_nothing_is(storage: Storage) -> None:
    """An empty directory is no error."""
    assert [] == list(storage.list("nothing/here"))


def test_lists_more_than_a_page(storage: Storage, client: Any) -> None:
    """All of more than 1000 objects come, each once."""
    keys = {f"paging/{i:04}" for i in range(1005)}
    present = client.get_paginator("list_objects_v2").paginate(Bucket="models", Prefix="paging/")
    missing = keys - {entry["Key"] for page in present for entry in page.get("Contents", ())}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: client.put_object(Bucket="models", Key=key, Body=b""), missing))

    listed = [info.path for info in storage.list("paging")]

    assert sorted(keys) == sorted(listed)


def test_lists_a_whole_bucket(opened: Callable[..., S3Storage], client: Any, put: Callable[..., str]) -> None:
    """The empty prefix stands for all of the bucket."""
    client.create_bucket(Bucket="small")
    put("top", b"", "small")
    put("a/b", b"", "small")

    assert {"top", "a/b"} == {info.path for info in opened("s3://small").list("")}


def test_tells_the_size_and_version(storage: Storage, put: Callable[..., str]) -> None:
    """The version is the ETag with its quotes, the same in stat and list."""
    etag = put("stat/object", CONTENT)

    info = storage.stat("stat/object")

    assert (len(CONTENT), etag) == (info.size, info.version)
    assert [info.version] == [listed.version for listed in storage.list("stat")]


CHECKSUMS = ["CRC32", "CRC32C", "CRC64NVME", "SHA1", "SHA256"]


@pytest.mark.parametrize("algorithm", CHECKSUMS)
def test_tells_the_digests_that_s3_keeps(storage: Storage, put: Callable[..., str], algorithm: str) -> None:
    """The checksum that an object was uploaded with comes back in hex, and so does the MD5 that is its ETag."""
    name = algorithm.lower()
    put(f"stat/{name}", CONTENT, ChecksumAlgorithm=algorithm)

    assert {name: _digest(name, CONTENT), "md5": _digest("md5", CONTENT)} == dict(storage.stat(f"stat/{name}").digests)


@pytest.mark.parametrize(
    ("algorithm", "kind"),
    [
        *((algorithm, "FULL_OBJECT") for algorithm in ("CRC32", "CRC32C", "CRC64NVME")),
        *((algorithm, "COMPOSITE") for algorithm in ("CRC32", "CRC32C", "SHA1", "SHA256")),  # S3 has no others
    ],
)
def test_tells_no_digests_of_parts(storage: Storage, client: Any, algorithm: str, kind: Any) -> None:
    """Of an upload in parts, only a checksum of the whole object counts; its ETag is no MD5."""
    key, content = f"parts/{algorithm}-{kind}", [os.urandom(5 << 20), os.urandom(1000)]
    upload = client.create_multipart_upload(Bucket="models", Key=key, ChecksumAlgorithm=algorithm, ChecksumType=kind)
    place = {"Bucket": "models", "Key": key, "UploadId": upload["UploadId"]}
    parts = []
    for number, body in enumerate(content, 1):
        part = client.upload_part(**place, PartNumber=number, Body=body, ChecksumAlgorithm=algorithm)
        checksum = {name: value for name, value in part.items() if name.startswith("Checksum")}
        parts.append({"PartNumber": number, "ETag": part["ETag"], **checksum})
    client.complete_multipart_upload(**place, MultipartUpload={"Parts": parts})

    name = algorithm.lower()
    whole = {name: _digest(name, b"".join(content))} if kind == "FULL_OBJECT" else {}

    assert whole == dict(storage.stat(key).digests)


def _digest(algorithm: str, content: bytes) -> str:
    if algorithm.startswith("crc"):
        compute, digits = getattr(checksums, algorithm), 16 if algorithm == "crc64nvme" else 8
        return f"{compute(content, 0):0{digits}x}"
    return hashlib.new(algorithm, content).hexdigest()


@pytest.mark.parametrize(
    ("offset", "length"),
    [(0, 1), (0, len(CONTENT)), (1000, 1 << 19), (len(CONTENT) - 1, 1)],
)
def test_reads_the_range_into_the_given_memory(
    storage: Storage, put: Callable[..., str], offset: int, length: int
) -> None:
    """Exactly the range lands in exactly the memory that was given, and nothing beside it changes."""
    etag = put("read/object", CONTENT)
    memory = bytearray(b"#" * (length + 20))

    count = storage.read_into("read/object", offset, memoryview(memory)[10:-10], version=etag)

    assert length == count
    assert b"#" * 10 + CONTENT[offset : offset + length] + b"#" * 10 == memory


def test_reads_any_version_where_none_is_given(storage: Storage, put: Callable[..., str]) -> None:
    """None takes whatever is there."""
    put("read/any", b"one")
    put("read/any", b"two")
    memory = bytearray(3)

    storage.read_into("read/any", 0, memoryview(memory), version=None)

    assert b"two" == memory


def test_a_range_over_the_end_is_short(storage: Storage, put: Callable[..., str]) -> None:
    """What there is arrives, and the count says how much that is."""
    etag = put("read/short", b"0123456789")
    memory = bytearray(b"#" * 10)

    count = storage.read_into("read/short", 6, memoryview(memory), version=etag)

    assert (4, b"6789######") == (count, bytes(memory))


def test_a_range_past_the_end_says_that_the_object_is_shorter(storage: Storage, put: Callable[..., str]) -> None:
    """A read that begins behind the end means that the object was cut."""
    put("read/cut", b"0123456789")

    with pytest.raises(SourceChangedError, match=r"InvalidRange|416") as caught:
        storage.read_into("read/cut", 10, memoryview(bytearray(5)), version=None)

    assert not caught.value.retryable
    assert "shorter" in str(caught.value)


def test_a_replaced_object_is_noticed(storage: Storage, put: Callable[..., str]) -> None:
    """A read that is pinned to the old ETag fails, and puts nothing into memory."""
    put("noticed/object", b"old content")
    (info,) = storage.list("noticed")
    memory = bytearray(11)

    put("noticed/object", b"new content")

    with pytest.raises(SourceChangedError, match=r"HTTP 412, PreconditionFailed") as caught:
        storage.read_into("noticed/object", 0, memoryview(memory), version=info.version)
    assert bytes(11) == memory
    assert not caught.value.retryable


def test_a_missing_key_is_not_found(storage: Storage) -> None:
    """stat (a HEAD, whose 404 has no body) and read_into both say so, naming the URI and the operation."""
    with pytest.raises(
        NotFoundError, match=r"could not read the size of s3://models/no/such/key: S3 answered HTTP 404"
    ):
        storage.stat("no/such/key")
    with pytest.raises(NotFoundError, match=r"could not read bytes 5-9 of s3://models/no/such/key: .*NoSuchKey"):
        storage.read_into("no/such/key", 5, memoryview(bytearray(5)), version=None)


def test_a_bucket_is_no_object(storage: Storage) -> None:
    """The empty path is not found, without a request that S3 could misunderstand."""
    with pytest.raises(NotFoundError, match="a bucket is no object"):
        storage.stat("")


def test_a_missing_bucket_is_not_found(opened: Callable[..., S3Storage]) -> None:
    """Listing names the code that S3 gives for it."""
    with pytest.raises(NotFoundError, match="NoSuchBucket"):
        list(opened("s3://no-such-bucket").list("model"))


def test_a_reader_reads_what_it_may(opened: Callable[..., S3Storage], put: Callable[..., str]) -> None:
    """A user who may only read and list one bucket can load from it."""
    etag = put("reader/object", b"content")
    storage, memory = opened(user="reader"), bytearray(7)

    storage.read_into("reader/object", 0, memoryview(memory), version=etag)

    assert b"content" == memory
    assert ["reader/object"] == [info.path for info in storage.list("reader")]


@pytest.mark.parametrize(
    ("uri", "options", "code"),
    [
        ("s3://public", {"user": "reader"}, "AccessDenied"),
        ("s3://models", {"user": "stranger"}, "AccessDenied"),
        ("s3://models", {"AWS_SECRET_ACCESS_KEY": "not-the-secret"}, "SignatureDoesNotMatch"),
        ("s3://models", {"AWS_ACCESS_KEY_ID": "NOSUCHKEY00000000000"}, "InvalidAccessKeyId"),
        ("s3://models", {"MX_S3_ANONYMOUS": "1"}, "AccessDenied"),
    ],
)
def test_a_denied_read_says_why(
    opened: Callable[..., S3Storage], put: Callable[..., str], uri: str, options: dict[str, str], code: str
) -> None:
    """A user of another bucket, a wrong secret, an unknown key, no key: denied in every operation, never retried."""
    put("denied/object", b"content")
    storage = opened(uri, **options)

    with pytest.raises(AccessDeniedError, match=code) as listing:
        list(storage.list("denied"))
    with pytest.raises(AccessDeniedError, match=code) as reading:
        storage.read_into("denied/object", 0, memoryview(bytearray(5)), version=None)
    with pytest.raises(AccessDeniedError, match="HTTP 403"):
        storage.stat("denied/object")
    assert not listing.value.retryable
    assert not reading.value.retryable
    assert reading.value.hint


def test_anonymous_requests_read_public_buckets(
    opened: Callable[..., S3Storage], put: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With MX_S3_ANONYMOUS=1 no credentials are needed, and those that lie around are not used."""
    etag = put("model/weights", b"content", "public")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "NOSUCHKEY00000000000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nor-this-secret")
    storage, memory = opened("s3://public", MX_S3_ANONYMOUS="1"), bytearray(7)

    storage.read_into("model/weights", 0, memoryview(memory), version=etag)

    assert b"content" == memory
    assert ["model/weights"] == [info.path for info in storage.list("model")]


def test_no_credentials_are_reported_with_what_to_set(opened: Callable[..., S3Storage]) -> None:
    """Opening works without, and the first request says what can be set."""
    storage = opened(AWS_ACCESS_KEY_ID=None, AWS_SECRET_ACCESS_KEY=None)

    with pytest.raises(AccessDeniedError, match="no credentials were found") as caught:
        storage.stat("any")

    assert "MX_S3_ANONYMOUS=1" in str(caught.value)
    assert not caught.value.retryable


def test_credentials_and_endpoint_come_from_the_profile(
    server: SeaweedFS, opened: Callable[..., S3Storage], put: Callable[..., str], tmp_path: Any
) -> None:
    """AWS_PROFILE picks keys from the shared credentials file, and region and endpoint from the config file."""
    put("profile/object", b"content")
    reader = server.environ("reader")
    credentials, config = tmp_path / "credentials", tmp_path / "config"
    credentials.write_text(
        f"[serving]\naws_access_key_id = {reader['AWS_ACCESS_KEY_ID']}\n"
        f"aws_secret_access_key = {reader['AWS_SECRET_ACCESS_KEY']}\n"
    )
    config.write_text(f"[profile serving]\nregion = eu-west-3\nendpoint_url = {server.endpoint}\n")

    storage = opened(
        AWS_PROFILE="serving",
        AWS_SHARED_CREDENTIALS_FILE=str(credentials),
        AWS_CONFIG_FILE=str(config),
        AWS_ACCESS_KEY_ID=None,
        AWS_SECRET_ACCESS_KEY=None,
        AWS_ENDPOINT_URL=None,
        AWS_REGION=None,
    )

    assert 7 == storage.stat("profile/object").size
    assert "eu-west-3" == storage._client.meta.region_name


def test_the_session_token_is_sent(proxied: Callable[..., Any]) -> None:
    """Temporary credentials are signed with their token. (The server has no such user; what it was sent counts.)"""
    heads = []
    storage, _ = proxied(lambda _, head: heads.append(head), AWS_SESSION_TOKEN="the-token-of-the-session")

    with contextlib.suppress(AccessDeniedError):
        list(storage.list("any"))

    assert b"x-amz-security-token: the-token-of-the-session" in heads[0].lower()


def test_reads_from_many_threads_reuse_their_connections(proxied: Callable[..., Any], put: Callable[..., str]) -> None:
    """Eight threads need eight connections at most, however many ranges they read."""
    etag = put("reuse/object", CONTENT)
    storage, proxy = proxied()

    def read(i: int) -> bytes:
        memory = bytearray(10_000)
        storage.read_into("reuse/object", i * 10_000, memoryview(memory), version=etag)
        return bytes(memory)

    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(read, range(100)))

    assert CONTENT[: 100 * 10_000] == b"".join(parts)
    assert 100 == proxy.requests
    assert proxy.connections <= 8


def test_one_thread_uses_one_connection(proxied: Callable[..., Any], put: Callable[..., str]) -> None:
    """Reads, listings, and answers that are errors all leave the connection usable."""
    etag = put("reuse/object", CONTENT)
    storage, proxy = proxied()
    memory = memoryview(bytearray(len(CONTENT)))

    for _ in range(5):
        storage.read_into("reuse/object", 0, memory, version=etag)
        storage.stat("reuse/object")
        list(storage.list("reuse"))
        with pytest.raises(NotFoundError):
            storage.read_into("reuse/missing", 0, memory, version=None)

    assert 20 == proxy.requests
    assert 1 == proxy.connections


def test_an_upload_in_parts_reads_like_any_object(
    opened: Callable[..., S3Storage], server: SeaweedFS, tmp_path: Any
) -> None:
    """What `upload` of devtools stores in parts has an ETag that is no MD5, and reads back the same."""
    content = os.urandom(1 << 20) * 20
    (tmp_path / "shard").mkdir()
    (tmp_path / "shard" / "model.safetensors").write_bytes(content)
    uri = ModelURI.parse(server.upload(tmp_path, "models", "uploaded"))
    storage, memory = opened(str(uri)), bytearray(len(content))

    (info,) = storage.list(uri.path)
    count = storage.read_into(info.path, 0, memoryview(memory), version=info.version)

    assert "uploaded/shard/model.safetensors" == info.path
    assert "-" in (info.version or "")
    assert len(content) == count
    assert content == memory
