"""The server's configuration file: what it sets, and how every mistake in it is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from modelexpress_core.errors import SettingsError
from modelexpress_core.server.config import Config, read_config
from modelexpress_core.server.settings import LogSettings, ServerSettings, StoreVariables
from modelexpress_core.settings import Override, describe
from modelexpress_core.wire.settings import AuthSettings

_SECTIONS = {"": ServerSettings, "log": LogSettings}
_SECRET = "hunter2"

Read = Callable[..., Config]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """Reads a configuration from text."""

    def read(text: str | bytes, **environ: str) -> Config:
        path = tmp_path / "mx.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_config(
            _SECTIONS, environ, path=str(path), overrides={"log.level": Override("error", "--log-level")}
        )

    return read


def refused(read: Read, text: str | bytes) -> str:
    with pytest.raises(SettingsError) as raised:
        read(text)
    assert _SECRET not in str(raised.value)
    return str(raised.value)


def test_what_a_file_sets(read: Read) -> None:
    """At the top and in a section; flags and variables win over it."""
    config = read(
        "port: 1\nhost: h\ndrain_seconds: 5\nlog: {level: debug, format: json}\n", MODEL_EXPRESS_SERVER_HOST="e"
    )

    assert ServerSettings(host="e", port=1, drain_seconds=5.0) == config.get(ServerSettings)
    assert LogSettings(level="error", format="json") == config.get(LogSettings)
    sources = {key: value.source.rpartition("/")[2] for key, value in config.describe("mx")}
    assert {
        "host": "MODEL_EXPRESS_SERVER_HOST",
        "port": "mx.yaml, line 1",
        "drain_seconds": "mx.yaml, line 3",
        "log.level": "--log-level",
        "log.format": "mx.yaml, line 4",
    } == {key: source for key, source in sources.items() if source != "default"}


def test_an_empty_mapping_sets_nothing(read: Read) -> None:
    """Which is how a file says so."""
    assert ServerSettings() == read("# nothing\n{}\n").get(ServerSettings)


def test_all_mistakes_are_told_at_once(read: Read) -> None:
    """Each with its line, and with what is expected there."""
    said = refused(
        read,
        "port: 1\nport: 2\nprot: 3\nmetrics_port: '9401'\nlevel: info\nhost: 12:30\nlog:\n  fromat: json\n"
        "  level: loud\nremoval_seconds: -1\n7: seven\n",
    )

    for line in (
        "mx.yaml, line 2: port is in line 1 already",
        "mx.yaml, line 3: nothing is called prot; did you mean port?",
        "mx.yaml, line 4: metrics_port: '9401': expected a whole number, and this is text",
        "mx.yaml, line 5: nothing is called level; did you mean log.level?",
        "mx.yaml, line 6: host: expected text, and this is a whole number",
        "mx.yaml, line 8: nothing is called log.fromat; did you mean log.format?",
        "mx.yaml, line 9: log.level: 'loud': expected one of debug, info, warning, error",
        "mx.yaml, line 10: removal_seconds: -1: expected a number of seconds greater than 0",
        "mx.yaml, line 11: a key that is no text",
    ):
        assert f"{line}\n" in said.replace("host: 750: ", "host: ")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it is empty"),
        ("# nothing\n", "it is empty"),
        (f"[{_SECRET}]", "it holds no mapping"),
        (_SECRET, "it holds no mapping"),
        (f"port: [{_SECRET}", "line 1: expected ',' or ']'"),
        (f"port: 1\n\t{_SECRET}: 2", "line 2: found character"),
        (f"metadata: *{_SECRET}", "line 1: one document without aliases"),
        (f"port: 1\n---\n{_SECRET}: 2", "line 2: one document"),
        ("metadata: !hunter2!redis://x", "line 1: it is no YAML from there on"),
        ("metadata: '\\hunter2", "line 1: found unexpected end of stream"),
        ('metadata: "\\hunter2"', "line 1: found unknown escape character 'h'"),
        ("%hunter2 1\n%YAML x\n---\nport: 1", "line 2: expected a digit, but found 'x'"),
        ("port: !!bool foo", "port: the value (not shown) cannot be read"),
        ("host: !!timestamp foo", "host: the value (not shown) cannot be read"),
        ('port: !!int ""', "port: the value (not shown) cannot be read"),
        ('drain_seconds: !!float ""', "drain_seconds: the value (not shown) cannot be read"),
        ("port: !!int foo", "port: the value (not shown) cannot be read"),
        ("port: !!null foo", "port: the value is empty"),
        ("metadata: !!binary hunter2", "metadata: the value (not shown) cannot be read"),
        ("drain_seconds: 1e306", "drain_seconds: '1e306': expected a number, and this is text"),
        ("drain_seconds: 1.0e+306", "drain_seconds: 1e+306: expected a number of seconds of at most ten years"),
        (f"metadata: !{_SECRET} 1", "metadata: the value (not shown) cannot be read"),
        (f"metadata: &a [*a, {_SECRET}]", "metadata: the value (not shown) cannot be read"),
        (f"metadata: {{a: {_SECRET}, a: 2}}", "metadata: the value (not shown) cannot be read"),
        (f"metadata: [{_SECRET}]", "metadata: expected text, and this is a list"),
        ("port: 2020-99-99", "port: the value (not shown) cannot be read"),
        ("log: 5", "log: expected a mapping with some of level, format"),
        ("log:", "log: expected a mapping"),
        ("port:", "port: the value is empty"),
        ("? [a]\n: 1", "a key that is no text"),
        (f"xyz: {_SECRET}", "nothing is called xyz; there are host, port"),
        (f"'': {_SECRET}", "nothing is called "),
        (f"<<: {{port: {_SECRET}}}", "a key that is no text"),
        ("[" * 5000, "nested too deeply"),
        ("a: \0", "it is no YAML"),
        (_SECRET.encode() + b"\xff", "it is no text in UTF-8"),
        (b"#" * (1 << 21), "it is longer than 1 MiB"),
    ],
    ids=lambda value: repr(value[:24]),
)
def test_what_is_no_configuration(read: Read, text: str | bytes, reason: str) -> None:
    """Is refused with the file and the reason, and with nothing that stands in it."""
    said = refused(read, text)

    assert "mx.yaml" in said
    assert reason in said


@pytest.mark.parametrize("word", ["off", "Off", "OFF"])
def test_a_word_that_may_be_a_switch_is_text_where_text_is_chosen(tmp_path: Path, word: str) -> None:
    """As YAML 1.1 reads it, ``off`` is false: here it is the word that stands there."""
    path = tmp_path / "mx.yaml"
    path.write_text(f"auth: {{mode: {word}}}\n")

    assert "off" == read_config({"": ServerSettings, "auth": AuthSettings}, {}, path=str(path)).get(AuthSettings).mode


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("log: {level: no}", "log.level: 'no': expected one of debug"),
        ("log: {format: TRUE}", "log.format: 'TRUE': expected one of text, json"),
        ("log: {level: 5}", "log.level: 5: expected text, and this is a whole number"),
        ("log: {level: 2020-01-01}", "expected text, and this is a date"),
        ("host: off", "host: False: expected text, and this is true or false"),
        ("port: on", "port: True: expected a whole number, and this is true or false"),
    ],
)
def test_a_switch_elsewhere_is_a_switch(read: Read, text: str, reason: str) -> None:
    """Where there is no choice of words, or it is none of them; and numbers are never words."""
    assert reason in refused(read, text)


def test_what_is_wrong_with_the_whole_is_told_with_the_rest(read: Read, tmp_path: Path) -> None:
    """In one message; and what completes the configuration sees what can be used, and where that is from."""
    seen: dict[str, object] = {}

    def complete(config: Config) -> tuple[Config, list[str]]:
        seen.update(config.usable(ServerSettings))
        return config.with_fallbacks(ServerSettings, {"host": Override("f", "fallback")}), seen["wrong"]  # type: ignore[return-value]

    path = tmp_path / "mx.yaml"
    path.write_text("port: many\nmetrics_port: 7\n")
    seen["wrong"] = ["they do not fit"]
    with pytest.raises(SettingsError) as raised:
        read_config(_SECTIONS, {}, path=str(path), complete=complete)
    seen["wrong"] = []
    config = read_config(_SECTIONS, {"MX_DRAIN_SECONDS": "3"}, complete=complete)

    assert "line 1: port: 'many': expected a whole number" in str(raised.value)
    assert str(raised.value).count("they do not fit") == 1
    assert (7, f"{path}, line 2") == seen["metrics_port"]
    assert "port" not in seen
    assert "f" == config.get(ServerSettings).host


@pytest.mark.parametrize("path", ["nothing.yaml", ".", "a\0b", ""])
def test_a_file_that_cannot_be_read(path: str) -> None:
    """Is named, with the reason."""
    with pytest.raises(SettingsError, match=r"the configuration .* cannot be read: ") as raised:
        read_config(_SECTIONS, {}, path=path)

    assert "--config" in str(raised.value)


@pytest.mark.parametrize(
    ("environ", "uri"),
    [
        ({}, None),
        ({"REDIS_URL": "redis://r"}, None),
        ({"MX_METADATA_BACKEND": "memory", "REDIS_URL": "redis://r"}, "memory://"),
        ({"MX_METADATA_BACKEND": "redis"}, "redis://localhost:6379"),
        ({"MX_METADATA_BACKEND": "Redis", "MX_REDIS_HOST": "r", "MX_REDIS_PORT": "1"}, "redis://r:1"),
        ({"MX_METADATA_BACKEND": "redis", "MX_REDIS_HOST": "::1"}, "redis://[::1]:6379"),
        ({"MX_METADATA_BACKEND": "redis", "REDIS_URL": "rediss://r/1", "MX_REDIS_HOST": "x"}, "rediss://r/1"),
        ({"MX_METADATA_BACKEND": "kubernetes"}, "kubernetes://"),
    ],
)
def test_variables_of_existing_deployments(environ: dict[str, str], uri: str | None) -> None:
    """The backend says whether the others matter."""
    from modelexpress_core.settings import from_env

    given = from_env(StoreVariables, environ).metadata()

    assert uri == (given and given.value)


def test_a_backend_that_there_is_not() -> None:
    """Those that there are are named."""
    with pytest.raises(SettingsError, match="'etcd'; there are memory, redis, kubernetes"):
        StoreVariables(backend="etcd").metadata()


def test_a_url_in_the_wrong_variable_is_not_shown() -> None:
    """With the password in it, where a word or a host belongs."""
    url = f"redis://:{_SECRET}@r"
    rows = describe(StoreVariables, {"MX_METADATA_BACKEND": url, "MX_REDIS_HOST": url}, owner="x")
    with pytest.raises(SettingsError) as raised:
        StoreVariables(backend=url).metadata()

    assert ["redis://***@r", "redis://***@r"] == [row.value for row in rows if row.source != "default"]
    assert _SECRET not in str(raised.value) + repr(StoreVariables(backend=url, redis_host=url))


def test_a_password_in_a_url_is_not_shown() -> None:
    """Neither by the settings nor by what gives the metadata."""
    variables = StoreVariables(backend="redis", redis_url=f"redis://:{_SECRET}@r")

    assert _SECRET not in repr(variables) + repr(variables.metadata())


@pytest.mark.parametrize(
    ("environ", "shown"),
    [
        ({"MODEL_EXPRESS_SECURITY_MODE": "enforce"}, "auth.mode = kubernetes (from MODEL_EXPRESS_SECURITY_MODE)"),
        ({"MODEL_EXPRESS_SECURITY_MODE": "off"}, "auth.mode = off"),
    ],
)
def test_the_security_mode_of_existing_deployments(environ: dict[str, str], shown: str) -> None:
    """It stands for a mode of ours."""
    from modelexpress_core.server.settings import SecurityVariables
    from modelexpress_core.settings import from_env

    mode = from_env(SecurityVariables, environ).auth_mode()

    said = "auth.mode = off" if mode is None else f"auth.mode = {mode.value} (from {mode.source})"
    assert shown == said
