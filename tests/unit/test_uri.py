"""What a model URI says, how it is shown, and what the usual slips are told."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from modelexpress_core.errors import InvalidURIError
from modelexpress_core.uri import ModelURI, redacted
from tests.support.properties import examples

_SECRET = "hunter2"

_schemes = st.from_regex(r"[a-zA-Z][a-zA-Z0-9+.-]{0,8}", fullmatch=True)
_text = st.text(st.characters(), max_size=40)  # surrogates included
#: Text that is likely to look like a URI, or nearly.
_nearly = st.lists(
    st.one_of(
        st.sampled_from(["s3", "file", "://", ":/", "/", "//", "?", "#", "@", ":", "%", "%2F", "%00", "%0A", "%ff"]),
        st.sampled_from(["..", ".", "~", "[", "]", "&", "=", "localhost", "\udc80", "\ud800", "é", " ", "\n", "\x7f"]),
        _text,
    ),
    max_size=8,
).map("".join)
#: What a file name may be: any bytes, as Python presents them.
_names = st.binary(min_size=1, max_size=12).map(os.fsdecode)


# -- what it says ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "scheme", "authority", "path"),
    [
        ("s3://bucket/models/llama", "s3", "bucket", "models/llama"),
        ("S3://Bucket/Models", "s3", "Bucket", "Models"),
        ("s3://bucket", "s3", "bucket", ""),
        ("s3://bucket/", "s3", "bucket", ""),
        ("s3://bucket/models/", "s3", "bucket", "models"),
        ("s3://bucket/a%20b%23c", "s3", "bucket", "a b#c"),
        ("s3://bucket/a b", "s3", "bucket", "a b"),
        ("s3://bucket/mod%C3%A8le", "s3", "bucket", "modèle"),
        ("s3://bucket/a%2525", "s3", "bucket", "a%25"),
        ("s3://bucket/step=100/model@v1", "s3", "bucket", "step=100/model@v1"),
        ("mx://host:9000/model", "mx", "host:9000", "model"),
        ("mx://[::1]:9000/model", "mx", "[::1]:9000", "model"),
        ("memory://name/a", "memory", "name", "a"),
        ("memory:///a", "memory", "", "/a"),
        ("my+scheme-1.0://x/y", "my+scheme-1.0", "x", "y"),
        ("file:///models/llama", "file", "", "/models/llama"),
        ("file://localhost/models", "file", "", "/models"),
        ("file:///models/../x/./y/", "file", "", "/x/y"),
        ("FILE:///a%20b", "file", "", "/a b"),
        ("/models/llama", "file", "", "/models/llama"),
        ("/models/../x", "file", "", "/x"),
        ("/models/a%20b", "file", "", "/models/a%20b"),
        ("/models/a?b#c", "file", "", "/models/a?b#c"),
    ],
)
def test_a_uri_is_taken_apart(text: str, scheme: str, authority: str, path: str) -> None:
    """Scheme in lower case, path decoded in URIs and left alone in plain paths."""
    uri = ModelURI.parse(text)

    assert (scheme, authority, path) == (uri.scheme, uri.authority, uri.path)
    assert "" == uri.userinfo
    assert {} == dict(uri.query)


def test_userinfo_and_query_are_kept_for_the_plugin() -> None:
    """What is hidden in messages is there for the plugin that needs it."""
    uri = ModelURI.parse(f"s3://key:{_SECRET}@bucket/m?region=eu&sig={_SECRET}&empty=&space=a+b%20c")

    assert f"key:{_SECRET}" == uri.userinfo
    assert "bucket" == uri.authority
    assert {"region": "eu", "sig": _SECRET, "empty": "", "space": "a b c"} == dict(uri.query)


def test_a_path_object_is_a_path_whatever_it_looks_like(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``pathlib`` paths are never parsed as URIs nor decoded, and relative ones start here."""
    monkeypatch.chdir(tmp_path)

    assert str(tmp_path / "a%20b") == ModelURI.parse(Path("a%20b")).path
    assert str(tmp_path / "model") == ModelURI.parse("model").path
    assert str(tmp_path) == ModelURI.parse(".").path


def test_the_home_directory_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """``~`` at the start of a plain path."""
    monkeypatch.setenv("HOME", "/home/somebody")

    assert "/home/somebody/models" == ModelURI.parse("~/models").path


def test_parsing_what_is_parsed_changes_nothing() -> None:
    """Functions take text or URI; the second parse is free."""
    uri = ModelURI.parse("s3://bucket/m")

    assert uri is ModelURI.parse(uri)


@pytest.mark.parametrize(
    ("uri", "relative", "expected"),
    [
        ("s3://bucket/model", "a.safetensors", "s3://bucket/model/a.safetensors"),
        ("s3://bucket", "a", "s3://bucket/a"),
        ("/models", "a/b", "file:///models/a/b"),
        ("file:///", "a", "file:///a"),
        ("memory://name", "a", "memory://name/a"),
        ("memory://", "a", "memory:///a"),
        ("memory:///x", "a", "memory:///x/a"),
        ("s3://bucket/m?region=eu", "a%b", "s3://bucket/m/a%25b?region=eu"),
    ],
)
def test_join_goes_one_step_down(uri: str, relative: str, expected: str) -> None:
    """The authority, query and user information stay; the result can be parsed again."""
    joined = ModelURI.parse(uri).join(relative)

    assert expected == str(joined)
    assert joined == ModelURI.parse(str(joined))


@pytest.mark.parametrize(
    ("uri", "name"), [("s3://bucket/a/b", "b"), ("s3://bucket", "bucket"), ("/models/llama/", "llama"), ("/", "")]
)
def test_the_name_is_the_last_part(uri: str, name: str) -> None:
    """Of the path, or the authority where there is no path."""
    assert name == ModelURI.parse(uri).name


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda uri: pickle.loads(pickle.dumps(uri))])
def test_a_uri_can_be_copied_and_pickled(how: object) -> None:
    """Engines hand their configuration to worker processes."""
    uri = ModelURI.parse("s3://key:word@bucket/m?region=eu")

    again = how(uri)  # type: ignore[operator]  # one of three functions

    assert uri == again
    assert hash(uri) == hash(again)
    assert "key:word" == again.userinfo


# -- properties --------------------------------------------------------------------------------------------------------


# Most authorities that are made of any bytes are invalid.
@settings(deadline=None, max_examples=examples(300), suppress_health_check=[HealthCheck.filter_too_much])
@given(_schemes, st.lists(_names, max_size=3), st.lists(_names, max_size=4))
def test_what_is_shown_can_be_parsed_again(scheme: str, authority: list[str], path: list[str]) -> None:
    """Without query and user information, ``parse(str(uri)) == uri``, whatever names occur in it."""
    from urllib.parse import quote

    host, names = "".join(authority), "/".join(path)
    encoded = [quote(text, safe=safe, errors="surrogateescape") for text, safe in ((host, ""), (names, "/"))]
    try:
        uri = ModelURI.parse(f"{scheme}://{encoded[0]}/{encoded[1]}")
    except InvalidURIError:
        assume(False)

    assert uri == ModelURI.parse(str(uri))
    assert str(uri) == str(ModelURI.parse(str(uri)))


@settings(deadline=None, max_examples=examples(300))
@given(st.one_of(_text, _nearly))
def test_any_text_is_a_uri_or_an_invalid_one(text: str) -> None:
    """Nothing but ``InvalidURIError`` comes out, and what is accepted can be shown, parsed again and encoded."""
    try:
        uri = ModelURI.parse(text)
    except InvalidURIError:
        return

    shown = str(uri)
    assert shown.isascii()
    assert shown.isprintable()
    if not uri.query and not uri.userinfo:
        assert uri == ModelURI.parse(shown)


@settings(deadline=None, max_examples=examples(200))
@given(st.lists(_names, min_size=1, max_size=4).map("/".join))
def test_a_plain_path_is_never_decoded(path: str) -> None:
    """What comes in is what the file system gets, percent signs, question marks and all."""
    assume("\x00" not in path)
    text = f"/{path}"
    assume(not any(ord(c) < 32 or ord(c) == 127 for c in text))

    for given_as in (text, Path(text)) if "://" not in text else (Path(text),):
        uri = ModelURI.parse(given_as)
        assert os.path.abspath(os.fspath(given_as)) == uri.path
        assert uri == ModelURI.parse(str(uri))


@settings(deadline=None, max_examples=examples(200))
@given(
    st.from_regex(r"[A-Za-z0-9%_.:~-]{0,10}", fullmatch=True),
    st.sampled_from(["sig", "token", "X-Amz-Signature", "se", "password", "Region", "revision2"]),
    st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="&#+%;="), max_size=5),
)
def test_credentials_are_shown_nowhere(start: str, key: str, end: str) -> None:
    """User information and the value of any query parameter that is not known to be public."""
    uri = ModelURI.parse(f"s3://{start}{_SECRET}@bucket/m?{key}={_SECRET}{end}")

    for shown in (str(uri), repr(uri), f"{uri}", repr([uri]), str(uri.join("a")), repr(uri.with_path("b"))):
        assert _SECRET not in shown, shown
    assert "***@" in str(uri)
    assert f"{key}=***" in str(uri)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"redis://:{_SECRET}@host:6379/0", "redis://***@host:6379/0"),
        ("redis://host:6379/0", "redis://host:6379/0"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("/models/a", "file:///models/a"),
        ("/models/a@main", "file:///models/a@main"),
        (f"redis:{_SECRET}@host:6379", "***"),
        (f"collector:{_SECRET}@host:4317", "***"),
        (f"{_SECRET}@host", "***"),
        (f"//user:{_SECRET}@host/", "***"),
        (f"file:///redis:{_SECRET}@host", "***"),
        (f"redis:/:{_SECRET}@host", "***"),
    ],
)
def test_what_is_shown_of_a_text_that_may_be_a_uri(text: str, shown: str) -> None:
    """Nothing, where an at sign stands and nobody knows what comes before it."""
    assert shown == redacted(text)


@pytest.mark.parametrize("key", ["region", "revision", "version", "versionId"])
def test_public_query_values_are_shown(key: str) -> None:
    """They say which model is meant, and messages are of little use without them."""
    assert f"s3://bucket/m?{key}=a%20b" == str(ModelURI.parse(f"s3://bucket/m?{key}=a+b"))


# -- slips -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("   ", "empty"),
        ("s3:/bucket/model", "write s3://bucket/model"),
        ("file:/models/x", "write file:///models/x"),
        (Path("s3://bucket/model"), "write s3://bucket/model"),
        ("file://models/x", "file:///models/x"),
        ("s3://bucket/model\n", "newline"),
        ("s3://bucket/mo\x00del", "control character"),
        ("s3://bucket/a%0Ab", "control character"),
        ("s3://buc%0Aket/a", "control character"),
        ("s3://bucket/a%7Fb", "control character"),
        ("s3://bucket/model#part", "%23"),
        ("s3://bucket/../other", ".."),
        ("s3://bucket/a/./b", "'.'"),
        ("s3://bucket/%2E%2E/other", ".."),
        ("s3://bucket/a%FFb", "UTF-8"),
        (" s3://bucket/model", "spaces"),
        ('"s3://bucket/model"', "quotes"),
        ("3s://bucket/model", "starts with its scheme"),
        ("://bucket/model", "scheme"),
        ("s_3://bucket/model", "scheme"),
        (b"s3://bucket/model", "not bytes"),
        (None, "not NoneType"),
        (3, "not int"),
    ],
)
def test_a_slip_is_told_what_was_meant(text: object, said: str) -> None:
    """The message anticipates the mistake rather than pointing at a file that is not there."""
    with pytest.raises(InvalidURIError) as caught:
        ModelURI.parse(text)  # type: ignore[arg-type]  # also what is no text

    assert said in str(caught.value), str(caught.value)


def test_a_file_that_looks_like_a_slip_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd names are allowed to exist."""
    (tmp_path / "s3:").mkdir()
    (tmp_path / "s3:" / "model").touch()
    monkeypatch.chdir(tmp_path)

    assert str(tmp_path / "s3:" / "model") == ModelURI.parse("s3:/model").path


@pytest.mark.parametrize(
    "text",
    [
        f"s3://key:{_SECRET}@bucket/m\n",
        f"s3://key:{_SECRET}@bucket/m#part",
        f"s3://key:se#{_SECRET}@bucket/m",
        f"s3:/key:{_SECRET}@bucket/m",
        f"s3:/bucket/m?sig={_SECRET}",
        f"s3://bucket/m?sig={_SECRET}\r\n",
        f"s3://key:{_SECRET}@bucket/../m?sig={_SECRET}",
        f'"s3://key:{_SECRET}@bucket/m?sig={_SECRET}"',
        f"file://key:{_SECRET}@host/m",
        f"s3://key:se/{_SECRET}@bucket/m\n",
        f"s3://key:{_SECRET}\ud800@bucket/m",
        f"s3://key:{_SECRET}@bucket/%FF?sig={_SECRET}",
        f"redis:{_SECRET}@host:6379/0",
        f"redis:user:{_SECRET}@host:6379/0",
        f"redis:user:se?{_SECRET}@host/0",
        f"redis:/user:{_SECRET}#@host/0",
        f"redis:user@host/0?sig=a@{_SECRET}",
        f"user:{_SECRET}@redis://host",
    ],
)
def test_a_message_about_a_bad_uri_holds_no_credentials(text: str) -> None:
    """A stray newline in a variable is common, and the message goes to a log."""
    with pytest.raises(InvalidURIError) as caught:
        ModelURI.parse(text)

    everything = f"{caught.value}{caught.value!r}{caught.value.__cause__!r}{caught.value.__context__!s}"
    assert _SECRET not in everything, everything
