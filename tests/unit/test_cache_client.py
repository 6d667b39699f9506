"""What a reader believes of a server with a cache, and what it tells which server."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import BackendError, InvalidURIError, SourceChangedError
from modelexpress_core.sources.cache_client import CacheClient, CachedModel, sends_token_to
from modelexpress_core.sources.server_cache import cache_uri
from modelexpress_core.uri import ModelURI
from modelexpress_core.wire.client import Security
from modelexpress_core.wire.proto.modelexpress import cache_pb2


def model(place: str = "hf/org/model") -> CachedModel:
    return CachedModel(place, "1" * 40, "hf://org/model", {}, 10, 5, complete=False, manifest_digest="")


@pytest.mark.parametrize(
    ("place", "asked", "root"),
    [
        ("org/model", "org/model", "org/model"),
        ("hf/org/model", "org/model", "org/model"),
        ("org/model", "hf/org/model", "hf/org/model"),
        ("hf/org/model", "org/model/sub/model.safetensors", "org/model"),
        ("s3/bucket/a/b", "s3/bucket/a/b/model.safetensors", "s3/bucket/a/b"),
        ("file/a/a", "file/a/a", "file/a/a"),
    ],
)
def test_the_name_of_a_model_is_found_in_the_path(place: str, asked: str, root: str) -> None:
    """However the server calls it."""
    assert root == model(place).root_in(asked)


def test_another_model_than_the_one_asked_for_is_refused() -> None:
    """Its files would be taken for those of the URI."""
    with pytest.raises(BackendError, match="answered with the model 'other/model'"):
        model("other/model").root_in("org/name/sub")


def test_news_of_another_version_are_refused() -> None:
    """Versions are never mixed."""
    with pytest.raises(SourceChangedError, match="has the version 222"):
        model().updated(cache_pb2.OpenModelResponse(version="2" * 40))


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, False),
        ({"MODEL_EXPRESS_URL": "https://cache.example:8001"}, True),
        ({"MODEL_EXPRESS_URL": "Cache.Example"}, True),
        ({"MX_SERVER_ADDRESS": "cache.example:8001"}, True),
        ({"MODEL_EXPRESS_URL": "cache.example:8002"}, False),
        ({"MODEL_EXPRESS_URL": "cache.example.attacker:8001"}, False),
        ({"MX_DISCOVERY": "static://,server://cache.example:8001"}, True),
        ({"MX_DISCOVERY": "server://"}, False),
        ({"MODEL_EXPRESS_URL": "not an address"}, False),
    ],
)
def test_the_token_goes_to_servers_that_variables_name(environ: Mapping[str, str], expected: bool) -> None:
    """A URI may be a stranger's."""
    assert expected == sends_token_to(Endpoint.parse("cache.example:8001"), environ)


@pytest.mark.parametrize(
    "path", ["", "/etc/passwd", "a/../b", "a//b", "./a", "a\nb", "x" * 4097, "a/"], ids=lambda path: repr(path[:12])
)
def test_a_list_with_a_strange_path_is_refused(path: str) -> None:
    """Its paths become those of files."""
    answer = cache_pb2.OpenModelResponse(place="org/model", version="1" * 40)
    answer.files.add(path=path, size=1)

    with (
        CacheClient("127.0.0.1:1", security=Security()) as client,
        pytest.raises(BackendError, match="listed the file"),
    ):
        client._model_of(answer, "org/model")


@pytest.mark.parametrize("version", ["", "a b", "../..", "x" * 129])
def test_an_answer_with_a_strange_version_is_refused(version: str) -> None:
    """It goes into messages, and every later request."""
    answer = cache_pb2.OpenModelResponse(place="org/model", version=version)

    with CacheClient("127.0.0.1:1", security=Security()) as client, pytest.raises(BackendError, match="the version"):
        client._model_of(answer, "org/model")


@pytest.mark.parametrize(
    ("url", "uri", "expected"),
    [
        ("server:8001", "hf://org/name?revision=main", "mx://server:8001/hf/org/name?revision=main"),
        ("https://server", "s3://bucket/model", "mxs://server:8001/s3/bucket/model"),
        ("[::1]:9", "gs://bucket/a/b", "mx://[::1]:9/gs/bucket/a/b"),
    ],
)
def test_the_uri_by_which_a_server_is_asked(url: str, uri: str, expected: str) -> None:
    """It survives being shown and parsed again."""
    found = cache_uri(Endpoint.parse(url), ModelURI.parse(uri))

    assert expected == str(found)
    assert found == ModelURI.parse(str(found))


@pytest.mark.parametrize("uri", ["mx:///org/name", "mx://server/org/name?endpoint=http://x", "mx://me@server/org/name"])
def test_a_uri_that_no_server_takes_is_refused(uri: str) -> None:
    """With the form that it has to have."""
    from mx_grpc_stream._storage import open_cache

    with pytest.raises(InvalidURIError) as raised:
        open_cache(ModelURI.parse(uri), {})

    assert "mx://server:8001/org/name" in str(raised.value)
