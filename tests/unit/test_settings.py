"""How settings are read: converters, precedence, errors that name every bad variable, and no secrets anywhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from typing import Any, cast

import attrs
import pytest
from attrs import frozen
from hypothesis import given, settings
from hypothesis import strategies as st

from modelexpress_core.contracts.service import ServiceContext
from modelexpress_core.errors import SettingsError
from modelexpress_core.settings import (
    FileValue,
    LoadSettings,
    Override,
    PluginSettings,
    SettingSources,
    SettingValue,
    boolean,
    byte_count,
    describe,
    env,
    from_env,
    from_sources,
    names,
    pairs,
    positive_integer,
    seconds,
    variables,
    warn_unknown_variables,
)
from modelexpress_core.uri import redacted

_SECRET = "hunter2"


def _port(text: str) -> int:
    return int(text)


@frozen
class Example:
    """A settings class with a field of each sort."""

    bound: int | None = env("MX_BOUND", "OLD_BOUND", "OLDER_BOUND", default=None, converter=positive_integer, help="A.")
    flag: bool = env("MX_FLAG", default=False, converter=boolean, help="B.")
    word: str = env("MX_WORD", default="plain", help="C.")
    token: str | None = env("MX_TOKEN", default=None, help="D.", secret=True)
    port: int = env("MX_SECRET_PORT", default=1, converter=_port, help="E.", secret=True)
    prefer: Mapping[str, str] = env("MX_PAIRS", default=attrs.Factory(dict), converter=pairs, help="F.")
    listed: tuple[str, ...] = env("MX_NAMES", default=(), converter=names, help="G.")
    other: int = 7


# -- converters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("converter", "text", "expected"),
    [
        *((boolean, text, True) for text in ("1", "true", "TRUE", "yes", "on", " On ")),
        *((boolean, text, False) for text in ("0", "false", "False", "no", "off")),
        (positive_integer, "1", 1),
        (positive_integer, " 64 ", 64),
        (seconds, "10", 10.0),
        (seconds, "0.5", 0.5),
        (seconds, "2.5s", 2.5),
        (seconds, "1e3", 1000.0),
        (seconds, "315360000", 315360000.0),
        (byte_count, "268435456", 268435456),
        (byte_count, "256MiB", 256 << 20),
        (byte_count, "256M", 256 << 20),
        (byte_count, "256 mib", 256 << 20),
        (byte_count, "1GiB", 1 << 30),
        (byte_count, "1GB", 10**9),
        (byte_count, "1kb", 1000),
        (byte_count, "1K", 1024),
        (byte_count, "2TiB", 2 << 40),
        (byte_count, "5b", 5),
        (names, "a", ("a",)),
        (names, " a , b,, ", ("a", "b")),
        (pairs, "s3=mx-s3-fast", {"s3": "mx-s3-fast"}),
        (pairs, " s3 = a , gs=b,", {"s3": "a", "gs": "b"}),
        (pairs, "k=a=b", {"k": "a=b"}),
    ],
)
def test_a_converter_accepts(converter: Callable[[str], Any], text: str, expected: object) -> None:
    """Every way of writing a value that the reference promises."""
    assert expected == converter(text)


@pytest.mark.parametrize(
    ("converter", "text"),
    [
        *((boolean, text) for text in ("2", "y", "maybe", "truee", "-1")),
        *((positive_integer, text) for text in ("0", "-1", "1.5", "one", "1e3", "0x10", "9" * 30, "1 000")),
        *((seconds, text) for text in ("0", "-1", "nan", "inf", "1m", "10ms", "s", "1e999", "1e306", "315360001")),
        *((byte_count, text) for text in ("0", "0MiB", "-1", "1.5GiB", "1XB", "MiB", "256i", "256ib", "9" * 5000)),
        *((pairs, text) for text in ("s3", "=a", "s3=", "s3=a,gs", "s3=a,s3=b")),
    ],
)
def test_a_converter_refuses_with_a_reason(converter: Callable[[str], Any], text: str) -> None:
    """The reason says what is expected, so that the message is of use."""
    with pytest.raises(ValueError, match=r"expected|twice"):
        converter(text)


@settings(deadline=None)
@given(st.text(max_size=30), st.sampled_from([boolean, positive_integer, seconds, byte_count, names, pairs]))
def test_a_converter_never_fails_in_another_way(text: str, converter: Callable[[str], Any]) -> None:
    """Every text of a variable gives a value or a ``ValueError``, which becomes a ``SettingsError``."""
    try:
        converter(text)
    except ValueError:
        return


@settings(deadline=None)
@given(st.integers(1, 10**12), st.sampled_from(["", "K", "M", "KiB", "MiB", "kB", "MB"]))
def test_units_only_multiply(count: int, unit: str) -> None:
    """A number with a unit is the number times the unit."""
    assert count * byte_count(f"1{unit}") == byte_count(f"{count}{unit}")


# -- reading -----------------------------------------------------------------------------------------------------------


def test_defaults_stand_where_nothing_is_set() -> None:
    """An empty environment gives the defaults, also of fields that no variable sets."""
    assert Example() == from_env(Example, {})


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"MX_BOUND": "1", "OLD_BOUND": "2", "OLDER_BOUND": "3"}, 1),
        ({"OLD_BOUND": "2", "OLDER_BOUND": "3"}, 2),
        ({"OLDER_BOUND": "3"}, 3),
        ({"MX_BOUND": "", "OLD_BOUND": "2"}, 2),
        ({"MX_BOUND": "  ", "OLD_BOUND": "", "OLDER_BOUND": "3"}, 3),
        ({"MX_BOUND": ""}, None),
        ({"MX_BOUND": "1", "OLD_BOUND": "nonsense"}, 1),
    ],
)
def test_the_name_comes_before_its_aliases_and_empty_counts_as_unset(
    environ: dict[str, str], expected: int | None
) -> None:
    """The first that is set counts, in the order in which they are declared."""
    assert expected == from_env(Example, environ).bound


def test_the_process_environment_is_read_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mapping the variables of the process count."""
    monkeypatch.setenv("MX_WORD", "from outside")

    assert "from outside" == from_env(Example).word


def test_all_bad_variables_are_reported_at_once() -> None:
    """All can be corrected in one run: each is named with its value and the reason."""
    environ = {"OLD_BOUND": "many", "MX_FLAG": "perhaps", "MX_PAIRS": "s3", "MX_WORD": "fine"}

    with pytest.raises(SettingsError) as caught:
        from_env(Example, environ)

    text = str(caught.value)
    for part in ("OLD_BOUND='many'", "MX_FLAG='perhaps'", "MX_PAIRS='s3'", "whole number", "key=value"):
        assert part in text, text
    assert "MX_WORD" not in text
    assert "MX_BOUND" not in text.replace("OLD_BOUND", "")
    assert caught.value.hint


def test_settings_cannot_be_changed() -> None:
    """They are read once; what was read stays."""
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        from_env(Example, {}).word = "other"  # type: ignore[misc]  # what must not work


# -- secrets -----------------------------------------------------------------------------------------------------------


def test_a_secret_is_in_no_repr() -> None:
    """Settings get logged; secrets must not be in them."""
    read = from_env(Example, {"MX_TOKEN": _SECRET, "MX_SECRET_PORT": "4242"})

    assert _SECRET == read.token
    assert _SECRET not in repr(read)
    assert "4242" not in repr(read)
    assert _SECRET not in str(read)


def test_the_environment_is_in_no_repr() -> None:
    """Not in that of what settings are read from, nor in that of what services are given."""
    environ = {"MX_TOKEN": _SECRET}
    nothing = cast("Any", None)
    context = ServiceContext(nothing, environ, nothing, nothing, AsyncExitStack())

    assert _SECRET not in repr(SettingSources(environ))
    assert _SECRET not in repr(context)


def test_a_secret_is_in_no_message() -> None:
    """Not even where it cannot be converted and the converter's own reason quotes it, as that of ``int`` does."""
    with pytest.raises(SettingsError) as caught:
        from_env(Example, {"MX_SECRET_PORT": _SECRET})

    text = f"{caught.value}{caught.value!r}{caught.value.__cause__!r}{caught.value.__context__!r}"
    assert _SECRET not in text
    assert "MX_SECRET_PORT" in text


def test_a_secret_is_in_no_description() -> None:
    """``mx settings`` shows that it is set, and where, not what it is."""
    rows = {row.name: row for row in describe(Example, {"MX_TOKEN": _SECRET}, owner="mx-x")}

    assert ("***", "MX_TOKEN") == (rows["MX_TOKEN"].value, rows["MX_TOKEN"].source)
    assert ("", "default") == (rows["MX_SECRET_PORT"].value, rows["MX_SECRET_PORT"].source)
    assert _SECRET not in repr(rows)


def test_what_may_hold_a_secret_is_shown_as_the_field_says() -> None:
    """As a URI may hold a password: the rest of it is shown, and there is no repr."""

    @frozen
    class Place:
        where: str = env("MX_WHERE", default="file:///", help="W.", shown=redacted)

    environ = {"MX_WHERE": f"redis://:{_SECRET}@host:6379/0"}
    [row] = describe(Place, environ, owner="mx-x")

    assert environ["MX_WHERE"] == from_env(Place, environ).where
    assert "redis://***@host:6379/0" == row.value
    assert _SECRET not in repr(from_env(Place, environ))
    assert "file:///" == describe(Place, {}, owner="mx-x")[0].value
    assert "***" == describe(Place, {"MX_WHERE": f"s3:/{_SECRET}"}, owner="mx-x")[0].value


# -- describing --------------------------------------------------------------------------------------------------------


def test_describe_shows_every_setting_with_its_value_and_source() -> None:
    """One row for each variable, in the order of the class; values as they would be written."""
    environ = {"OLD_BOUND": "4", "MX_FLAG": "on", "MX_PAIRS": "s3=a,gs=b", "MX_NAMES": "x, y"}

    rows = describe(Example, environ, owner="mx-x")

    expected = SettingValue("MX_BOUND", ("OLD_BOUND", "OLDER_BOUND"), "4", "OLD_BOUND", "A.", "mx-x")
    assert expected == rows[0]
    shown = {row.name: (row.value, row.source) for row in rows}
    assert ("plain", "default") == shown["MX_WORD"]
    assert ("s3=a,gs=b", "MX_PAIRS") == shown["MX_PAIRS"]
    assert ("x,y", "MX_NAMES") == shown["MX_NAMES"]
    assert 7 == len(rows)
    assert ("", "default") == {row.name: (row.value, row.source) for row in describe(Example, {}, owner="")}["MX_BOUND"]


def test_describe_marks_what_cannot_be_read() -> None:
    """A bad value has a row that says what is wrong with it, and the others are as they would be without it."""
    rows = {row.name: row for row in describe(Example, {"MX_FLAG": "perhaps", "OLD_BOUND": "4"}, owner="mx-x")}

    assert "MX_FLAG='perhaps': expected 1 or 0" in rows["MX_FLAG"].problem
    assert ("4", "") == (rows["MX_BOUND"].value, rows["MX_BOUND"].problem)


@pytest.mark.parametrize(
    ("environ", "concerned"),
    [
        ({"MX_ONE": "1"}, ["MX_ONE", "MX_OTHER"]),
        ({"MX_OTHER": "1"}, ["MX_ONE", "MX_OTHER"]),
        ({"MX_THIRD": "1"}, ["MX_THIRD"]),
        ({"MX_ONE": "1", "MX_THIRD": "1"}, ["MX_ONE", "MX_OTHER", "MX_THIRD"]),
        ({"MX_ONE": "1", "MX_OTHER": "1"}, []),
    ],
)
def test_describe_marks_what_does_not_fit_together(environ: dict[str, str], concerned: list[str]) -> None:
    """At all that the message names, or else at all that is set; the others are there."""

    @frozen
    class Pair:
        one: str | None = env("MX_ONE", default=None, help="A.")
        other: str | None = env("MX_OTHER", default=None, help="B.")
        third: str | None = env("MX_THIRD", default=None, help="C.")
        fourth: str = env("MX_FOURTH", default="4", help="D.")

        def __attrs_post_init__(self) -> None:
            if (self.one is None) != (self.other is None):
                message = "MX_ONE and MX_OTHER belong together"
                raise SettingsError(message)
            if self.third:
                message = "this cannot be"
                raise SettingsError(message)

    rows = describe(Pair, {**environ, "MX_FOURTH": "5"}, owner="mx-x")

    marked = [row.name for row in rows if row.problem]
    if "MX_THIRD" in concerned:  # whose message names nothing
        concerned = [*concerned, "MX_FOURTH"]
    assert concerned == marked
    assert ["MX_ONE", "MX_OTHER", "MX_THIRD", "MX_FOURTH"] == [row.name for row in rows]


@pytest.mark.parametrize("cls", [PluginSettings, LoadSettings])
def test_our_own_settings_can_be_described_and_are_explained(cls: type) -> None:
    """Every setting of core has help, a name with our prefix, and a default that describes itself."""
    rows = describe(cls, {}, owner="modelexpress-core")

    assert len(rows) == len(attrs.fields(cls))
    assert [] == [row.name for row in rows if not row.name.startswith("MX_") or not row.help.endswith(".")]
    assert {"default"} == {row.source for row in rows}


def test_the_plugin_settings_read_the_variables_of_the_contract() -> None:
    """``MX_PLUGINS``, ``MX_DISABLED_PLUGINS``, ``MX_PREFER`` and ``MX_STRICT_PLUGINS``."""
    environ = {
        "MX_PLUGINS": "a",
        "MX_DISABLED_PLUGINS": "b,c",
        "MX_PREFER": "s3=mx-s3-fast",
        "MX_STRICT_PLUGINS": "1",
    }

    assert PluginSettings(("a",), ("b", "c"), {"s3": "mx-s3-fast"}, True) == from_env(PluginSettings, environ)
    assert set(environ) == set(variables(PluginSettings))


def test_the_other_streamers_bound_on_concurrency_is_understood() -> None:
    """``RUNAI_STREAMER_CONCURRENCY`` works where ``MX_CONCURRENCY`` is not set."""
    assert 32 == from_env(LoadSettings, {"RUNAI_STREAMER_CONCURRENCY": "32"}).concurrency
    assert 4 == from_env(LoadSettings, {"RUNAI_STREAMER_CONCURRENCY": "32", "MX_CONCURRENCY": "4"}).concurrency
    assert 256 << 20 == from_env(LoadSettings, {}).staging_bytes


# -- unknown variables -------------------------------------------------------------------------------------------------


def test_an_unknown_variable_earns_a_warning_with_the_nearest_name(caplog: pytest.LogCaptureFixture) -> None:
    """A misspelt variable would otherwise be ignored silently."""
    environ = {"MX_CONCURENCY": "4", "MX_QQQQ": "1", "PATH": "/bin", "MX_WORD": "x", "OTHER_MX_X": "1"}

    with caplog.at_level(logging.WARNING):
        unknown = warn_unknown_variables(environ, [*variables(Example), *variables(LoadSettings)])

    assert ("MX_CONCURENCY", "MX_QQQQ") == unknown
    assert 2 == len(caplog.records)
    assert "did you mean MX_CONCURRENCY?" in caplog.records[0].getMessage()
    assert "MX_QQQQ" in caplog.records[1].getMessage()
    assert "did you mean" not in caplog.records[1].getMessage()


def test_the_value_of_an_unknown_variable_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    """It may be a misspelt secret."""
    with caplog.at_level(logging.DEBUG):
        warn_unknown_variables({"MX_TOKN": _SECRET}, variables(Example))

    assert _SECRET not in caplog.text
    assert "MX_TOKEN" in caplog.text


def test_variables_of_other_parts_are_not_called_unknown(caplog: pytest.LogCaptureFixture) -> None:
    """The server and the client of peers read variables with our prefix too."""
    with caplog.at_level(logging.WARNING):
        unknown = warn_unknown_variables({"MX_SERVER_ADDRESS": "x", "MX_MODEL_URI": "x"}, [])

    assert () == unknown
    assert [] == caplog.records


def test_variables_names_aliases_too() -> None:
    """Whatever the class reads, in order."""
    assert ("MX_BOUND", "OLD_BOUND", "OLDER_BOUND", "MX_FLAG") == variables(Example)[:4]


@pytest.mark.parametrize("name", ["MX_CHUNK_BYTES", "MX_STAGING_BYTES"])
def test_a_buffer_that_holds_no_element_is_refused(name: str) -> None:
    """Here, and not by a thread in the middle of a load."""
    with pytest.raises(SettingsError, match="at least 16 bytes"):
        from_env(LoadSettings, {name: "8"})


# -- flags, variables and files ----------------------------------------------------------------------------------------


def file_values(**values: object) -> dict[str, FileValue]:
    return {name: FileValue(value, name, "mx.yaml, line 1") for name, value in values.items()}


@frozen
class Filed:
    """A settings class with a field of each type that a file may set."""

    count: int = env("MX_COUNT", default=1, converter=positive_integer, help="A.")
    plain: int = env("MX_PLAIN", default=1, help="B.", converter=int)
    share: float = env("MX_SHARE", default=0.5, help="C.", converter=float)
    wait: float | None = env("MX_WAIT", default=None, converter=seconds, help="D.")
    size: int = env("MX_SIZE", default=1, converter=byte_count, help="E.")
    flag: bool = env("MX_FLAG", default=False, converter=boolean, help="F.")
    word: str = env("MX_WORD", default="plain", help="G.")
    token: str | None = env("MX_TOKEN", default=None, help="H.", secret=True)
    url: str = env("MX_URL", default="", help="I.", shown=redacted)
    prefer: Mapping[str, str] = env("MX_PAIRS", default=attrs.Factory(dict), converter=pairs, help="J.")
    listed: tuple[str, ...] = env("MX_NAMES", default=(), converter=names, help="K.")


def test_flags_win_over_variables_and_those_over_files() -> None:
    """And all of them over the fallback, which wins over the default."""
    sources = SettingSources(
        {"MX_COUNT": "2", "MX_PLAIN": "2"},
        overrides={"count": Override(1, "--count")},
        file_values=file_values(count=3, plain=3, share=3),
        fallbacks={name: Override(4, "elsewhere") for name in ("count", "plain", "share", "size")},
    )

    settings = from_sources(Filed, sources)
    origins = {value.name: value.source for value in describe(Filed, sources, owner="x")}

    assert (1, 2, 3.0, 4, "plain") == (settings.count, settings.plain, settings.share, settings.size, settings.word)
    assert ["--count", "MX_PLAIN", "mx.yaml, line 1", "elsewhere", "default"] == [
        origins[name] for name in ("MX_COUNT", "MX_PLAIN", "MX_SHARE", "MX_SIZE", "MX_WORD")
    ]


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("count", 5, 5),
        ("share", 1, 1.0),
        ("share", 0.25, 0.25),
        ("wait", 30, 30.0),
        ("wait", "30s", 30.0),
        ("size", 1024, 1024),
        ("size", "1KiB", 1024),
        ("flag", True, True),
        ("word", "text", "text"),
        ("token", _SECRET, _SECRET),
        ("prefer", {"s3": "mx-s3"}, {"s3": "mx-s3"}),
        ("listed", ["a", "b"], ("a", "b")),
    ],
)
def test_values_of_files_have_a_type(field: str, value: object, expected: object) -> None:
    """That of the field; a whole number passes for a number, and text with a unit for one that may have it."""
    settings = from_sources(Filed, SettingSources({}, file_values=file_values(**{field: value})))

    assert expected == getattr(settings, field)
    assert type(expected) is type(getattr(settings, field))


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("count", "5", "'5': expected a whole number, and this is text"),
        ("count", 5.0, "5.0: expected a whole number, and this is a number"),
        ("count", True, "True: expected a whole number, and this is true or false"),
        ("count", 0, "0: expected a whole number of at least 1"),
        pytest.param("count", 1 << 50000, "the value (not shown) cannot be used", id="long"),
        ("share", "0.5", "'0.5': expected a number, and this is text"),
        ("share", False, "expected a number"),
        ("wait", "30", "'30': expected a number, and this is text"),
        ("wait", float("nan"), "expected a number of seconds"),
        ("wait", None, "wait: the value is empty"),
        ("flag", "true", "expected true or false, and this is text"),
        ("flag", 1, "expected true or false, and this is a whole number"),
        ("word", 5, "expected text, and this is a whole number"),
        ("word", "", "the value is empty"),
        ("listed", "a,b", "expected a list, and this is text"),
        ("listed", ["a", 1], "expected text, and this is a whole number"),
        ("listed", ["a,b"], "have no commas"),
        ("prefer", ["s3=x"], "expected a mapping, and this is a list"),
        ("prefer", {"s3": ""}, "not empty"),
    ],
)
def test_values_of_another_type_are_refused(field: str, value: object, reason: str) -> None:
    """With the place, the key, the value and what is expected."""
    with pytest.raises(SettingsError) as raised:
        from_sources(Filed, SettingSources({}, file_values=file_values(**{field: value})))

    assert f"mx.yaml, line 1: {field}: " in str(raised.value)
    assert reason in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("field", ["token", "url"])
@pytest.mark.parametrize("value", [[_SECRET], {_SECRET: _SECRET}])
def test_secrets_of_files_are_not_shown(field: str, value: object) -> None:
    """Neither in their problems nor in a list of settings."""
    sources = SettingSources({}, file_values=file_values(**{field: value}))
    with pytest.raises(SettingsError) as raised:
        from_sources(Filed, sources)

    assert f"{field}: expected text" in str(raised.value)
    assert _SECRET not in str(raised.value) + str(describe(Filed, sources, owner="x")) + repr(sources)


def test_problems_are_reported_even_if_another_value_wins() -> None:
    """All of it, of files, variables and several fields."""
    sources = SettingSources(
        {"MX_COUNT": "none", "MX_SHARE": "much"},
        overrides={"count": Override(1, "--count")},
        file_values=file_values(count=-1, flag=3),
    )
    with pytest.raises(SettingsError) as raised:
        from_sources(Filed, sources)

    for part in ("line 1: count: -1", "MX_COUNT='none'", "MX_SHARE='much'", "line 1: flag: 3"):
        assert part in str(raised.value)
