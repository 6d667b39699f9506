"""The digests that HTTP stores publish of a whole object, in the form that ``ObjectInfo.digests`` has them."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping

__all__ = ["hex_of_base64", "md5_of_etag"]

#: Length of each digest in bytes.
_LENGTHS: Mapping[str, int] = {"crc32": 4, "crc32c": 4, "crc64nvme": 8, "md5": 16, "sha1": 20, "sha256": 32}

_MD5_ETAG = re.compile(r'"([0-9A-Fa-f]{32})"')


def hex_of_base64(algorithm: str, text: str | None) -> str | None:
    """A digest in lower-case hex; None where ``text`` is not one of this algorithm.

    Args:
        algorithm: As in ``ObjectInfo.digests``.
        text: Base64, as in headers such as ``Content-MD5`` and ``x-amz-checksum-sha256``.
    """
    try:
        digest = base64.b64decode(text or "", validate=True)
    except binascii.Error:
        return None
    return digest.hex() if len(digest) == _LENGTHS[algorithm] else None


def md5_of_etag(etag: str | None) -> str | None:
    """The MD5 in a strong ETag of that form, in lower-case hex; only the service knows whether it is the content's."""
    match = _MD5_ETAG.fullmatch(etag or "")
    return match[1].lower() if match else None
