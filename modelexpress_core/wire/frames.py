"""The frames of a stream: a header of 12 bytes, and up to four mebibytes of a tensor or a file.

The header has the position of the range in the request (32 bits) and the CRC-64/NVME of the bytes that follow it (64
bits), both little-endian; the CRC is 0 where the reader wants none, because it knows the digests of the bytes. The
frames of one range follow one another, in the order of its bytes. A range is complete with its last byte, and the
stream with the last range.
"""

from __future__ import annotations

import struct

from awscrt import checksums

__all__ = ["FRAME_BYTES", "HEADER_BYTES", "frame_of", "opened"]

#: Bytes of content in one frame: gRPC is fastest with messages of one to four mebibytes, and fewer cost less here.
FRAME_BYTES = 4 << 20

_HEADER = struct.Struct("<IQ")
HEADER_BYTES = _HEADER.size


def frame_of(position: int, content: memoryview, *, checksum: bool) -> bytes:
    """A frame with ``content``."""
    return b"".join((_HEADER.pack(position, checksums.crc64nvme(content, 0) if checksum else 0), content))


def opened(frame: bytes, *, checksum: bool) -> tuple[int, memoryview]:
    """The position and the content of a frame.

    Raises:
        ValueError: It is too short or too long, or its content does not have its checksum.
    """
    if not HEADER_BYTES < len(frame) <= HEADER_BYTES + FRAME_BYTES:
        reason = f"a frame of {len(frame)} bytes"
        raise ValueError(reason)
    position, sent = _HEADER.unpack_from(frame)
    content = memoryview(frame)[HEADER_BYTES:]
    if checksum and checksums.crc64nvme(content, 0) != sent:
        reason = "the content of a frame does not have its checksum: bits changed on the way"
        raise ValueError(reason)
    return position, content
