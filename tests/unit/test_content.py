"""Messages with much content, which are encoded with one copy of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelexpress_core.wire.content import with_content
from modelexpress_core.wire.proto.modelexpress import model_pb2


@given(path=st.text(max_size=20), offset=st.integers(0, 2**64 - 1), content=st.binary(max_size=400))
def test_protobuf_decodes_what_was_encoded(path: str, offset: int, content: bytes) -> None:
    message = model_pb2.FileChunk(relative_path=path, offset=offset, is_last_chunk=True)
    decoded = model_pb2.FileChunk.FromString(with_content(message, "data", memoryview(content)))
    assert decoded == model_pb2.FileChunk(relative_path=path, offset=offset, is_last_chunk=True, data=content)


@pytest.mark.parametrize("length", [127, 128, 16_383, 16_384, 1 << 20, (1 << 21) + 1])
def test_lengths_of_each_number_of_bytes(length: int) -> None:
    content = bytes(range(256)) * (length // 256 + 1)
    encoded = with_content(model_pb2.FileChunk(), "data", content[:length])
    assert model_pb2.FileChunk.FromString(encoded).data == content[:length]


def test_other_fields_than_bytes_have_no_content() -> None:
    with pytest.raises(KeyError):
        with_content(model_pb2.FileChunk(), "content", b"")
