"""Which digests a made-up answer to a HEAD tells, for what the test server does not do."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Mapping

import pytest

from mx_s3._storage import S3Storage

MD5 = hashlib.md5(b"content").hexdigest()
SHA256 = base64.b64encode(hashlib.sha256(b"content").digest()).decode()


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({"ETag": f'"{MD5}"'}, {"md5": MD5}),
        ({"ETag": f'"{MD5.upper()}"'}, {"md5": MD5}),
        ({"ETag": f'"{MD5}"', "x-amz-server-side-encryption": "AES256"}, {"md5": MD5}),
        ({"ETag": f'"{MD5}"', "x-amz-server-side-encryption": "aws:kms"}, {}),
        ({"ETag": f'"{MD5}"', "x-amz-server-side-encryption": "aws:kms:dsse"}, {}),
        ({"ETag": f'"{MD5}"', "x-amz-server-side-encryption": "something:new"}, {}),
        ({"ETag": f'"{MD5}"', "x-amz-server-side-encryption-customer-algorithm": "AES256"}, {}),
        ({"ETag": f'"{MD5}-1"'}, {}),
        ({"ETag": f'W/"{MD5}"'}, {}),
        ({"ETag": '"0x8D4BCC2E4835CD0"'}, {}),
        ({"ETag": '"x"', "x-amz-checksum-sha256": SHA256}, {"sha256": hashlib.sha256(b"content").hexdigest()}),
        ({"ETag": '"x"', "x-amz-checksum-sha256": SHA256, "x-amz-checksum-type": "COMPOSITE"}, {}),
        ({"ETag": '"x"', "x-amz-checksum-sha256": f"{SHA256}-3"}, {}),
        ({"ETag": '"x"', "x-amz-checksum-sha256": "no base64!"}, {}),
        ({"ETag": '"x"', "x-amz-checksum-crc32": SHA256}, {}),
        (
            {"ETag": f'"{MD5}"', "x-amz-server-side-encryption": "aws:kms", "x-amz-checksum-crc32": "AAAAAQ=="},
            {"crc32": "00000001"},
        ),
    ],
)
def test_a_made_up_answer_tells_only_digests_of_the_whole(
    scripted: Callable[..., S3Storage], headers: Mapping[str, str], expected: dict[str, str]
) -> None:
    """An ETag is an MD5 only where S3 says so; what cannot be the checksum that it is called is passed over."""
    storage = scripted((200, {"Content-Length": "7", **headers}, b""))

    assert expected == dict(storage.stat("object").digests)


@pytest.mark.parametrize("bucket", ["models--use1-az4--x-s3", "alias-abc--use1-az4--xa-s3"])
def test_made_up_etags_of_directory_buckets_are_no_md5(scripted: Callable[..., S3Storage], bucket: str) -> None:
    """They look like one, and are not. (Unsigned, because such buckets are asked for a session first.)"""
    answer = (200, {"Content-Length": "7", "ETag": f'"{MD5}"'}, b"")
    storage = scripted(answer, uri=f"s3://{bucket}", MX_S3_ANONYMOUS="1")

    assert {} == dict(storage.stat("object").digests)
