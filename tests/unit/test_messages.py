"""Text of others in messages: visible, in one line, and without credentials."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

import modelexpress_core as mx
from modelexpress_core.messages import (
    hide_credentials,
    hide_credentials_of_urls,
    printable,
    printable_lines,
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model-00001.safetensors", "model-00001.safetensors"),
        ("ünïcödé-模型-🙂", "ünïcödé-模型-🙂"),
        ("a\nNext step: curl evil", r"a\nNext step: curl evil"),
        ("\x1b]0;owned\x07", r"\x1b]0;owned\x07"),
        ("\x9b31m\x7f\t\r", r"\x9b31m\x7f\t\r"),
        ("safe\u202egpj.exe", r"safe\u202egpj.exe"),
        ("\u2066a\u2069\u200e\u200f\u061c", r"\u2066a\u2069\u200e\u200f\u061c"),
        ("mo\u200bdel\u200c\u200d\ufeff\u2060\u00ad", r"mo\u200bdel\u200c\u200d\ufeff\u2060\xad"),
        ("a\u2028b\u2029c\x85", r"a\u2028b\u2029c\x85"),
        ("a\u3164\u115f\ufe0fb\U000e0041", r"a\u3164\u115f\ufe0fb\U000e0041"),
        ("\udcff", r"\udcff"),
    ],
)
def test_what_cannot_be_seen_is_escaped(text: str, shown: str) -> None:
    assert shown == printable(text)


@given(st.text())
def test_what_is_printed_is_printable(text: str) -> None:
    """It can be encoded, too, and lines stay as many as they were."""
    assert printable(text).isprintable()
    assert text.count("\n") == printable_lines(text).count("\n")
    printable_lines(text).encode()


def test_an_error_shows_names_of_others_escaped() -> None:
    """Also in cause and hint; our own line ends stay."""
    error = mx.ModelExpressError("a\u202eb\x1b[2J:\n  c", cause="\u200bd", hint="e\x07")

    assert "a\\u202eb\\x1b[2J:\n  c\nLikely cause: \\u200bd.\nNext step: e\\x07." == str(error)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://u:p@h/x", "https://***@h/x"),
        ("https://h/x?sig=p&region=r", "https://h/x?***"),
        ("u:p@h", "***@h"),
        ("s3:/u:p@h/x?sig=p", "s3:/***@h/x?***"),
        ("h/x?sig=p", "h/x?***"),
        ("/home/u@h/x", "/home/u@h/x"),
        ("/what?/x", "/what?/x"),
        ("name", "name"),
    ],
)
def test_credentials_of_a_value_are_hidden(text: str, shown: str) -> None:
    assert shown == hide_credentials(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("could not read https://u:p@h/x: gone", "could not read https://***@h/x: gone"),
        ("redis://:a/b@h, and 's3://u:p@b/k'", "redis://***@h, and 's3://***@b/k'"),
        ("see https://h/x?sig=p.", "see https://h/x?sig=***."),
        ("s3://b/k?region=eu&sig=p: no", "s3://b/k?region=eu&sig=***: no"),
        ("s3://b/k?p", "s3://b/k?***"),
        ("write to a@b.example", "write to a@b.example"),
        ("is it? no", "is it? no"),
    ],
)
def test_credentials_of_urls_in_a_text_are_hidden(text: str, shown: str) -> None:
    assert shown == hide_credentials_of_urls(text)
    assert shown == hide_credentials_of_urls(shown)


@pytest.mark.parametrize("text", ["a:/" * 20_000, "a" * 200_000, "a://" + "?" * 100_000, "a:/?" * 30_000 + "@ "])
def test_hiding_takes_time_in_proportion_to_the_length(text: str) -> None:
    """Messages of servers can be long."""
    hide_credentials_of_urls(text)
