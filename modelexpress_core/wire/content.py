"""Messages with much content, encoded with one copy of it; protobuf itself takes three."""

from __future__ import annotations

from google.protobuf.message import Message

__all__ = ["with_content"]

_LENGTH_DELIMITED = 2


def with_content(message: Message, name: str, content: bytes | memoryview) -> bytes:
    """``message`` as it is sent, with ``content`` in one of its fields.

    Decoders take the fields of a message in any order, so that this one may come last.

    Args:
        message: All the other fields.
        name: The field, of type ``bytes``, which is not set in ``message``.
        content: Its value.
    """
    tag = message.DESCRIPTOR.fields_by_name[name].number << 3 | _LENGTH_DELIMITED
    return b"".join((message.SerializeToString(), _varint(tag), _varint(len(content)), content))


def _varint(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
