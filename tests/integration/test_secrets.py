"""No command shows a secret, in whichever variable or argument it is: neither on stdout and stderr nor in the log."""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import re
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import modelexpress_core as mx
from modelexpress_core.cli.app import build_app
from modelexpress_core.plugins import PluginManager
from modelexpress_core.settings import CORE_SETTINGS, describe, from_env
from modelexpress_core.settings.declaring import fields
from tests.support.checkpoints import pattern, safetensors_file
from tests.support.network import CLOSED_PORT

pytestmark = pytest.mark.slow

SECRET = "swordfish-5ecret"

#: How people write secrets where something else belongs.
URLS = {
    "password": f"https://alice:{SECRET}@host.invalid/model",
    "token": f"redis://{SECRET}@host.invalid:6379/0",
    "signed": f"https://host.invalid/model?X-Amz-Signature={SECRET}&X-Amz-Date=1",
    "one slash": f"s3:/key:{SECRET}@bucket/model?sig={SECRET}",
    "no scheme": f"alice:{SECRET}@host.invalid",
}


#: Both in one.
URL = f"https://alice:{SECRET}@host.invalid/model?X-Amz-Signature={SECRET}"


def settings_classes() -> list[type]:
    """Every settings class of core and of plugins."""
    return [*CORE_SETTINGS, *dict.fromkeys(cls for _, cls in PluginManager.discover({}).settings_classes())]


CLASSES = settings_classes()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("secrets") / "model.safetensors"
    path.write_bytes(safetensors_file({"a": ("F32", [4], pattern(16))}))
    return str(path)


@pytest.fixture(scope="module")
def app() -> Any:
    return build_app()


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """Undo what commands do to loggers."""
    root, ours = logging.getLogger(), logging.getLogger("modelexpress_core")
    before = (root.handlers[:], root.level, ours.level)
    yield
    root.handlers[:], level, our_level = before
    root.setLevel(level)
    ours.setLevel(our_level)


#: Connections fail at once, and nothing of this machine's own configuration is read.
QUIET = {
    "AWS_ACCESS_KEY_ID": "AKIAEXAMPLE",
    "AWS_SECRET_ACCESS_KEY": "other",
    "AWS_ENDPOINT_URL": f"http://127.0.0.1:{CLOSED_PORT}",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "1",
    "MODEL_EXPRESS_URL": f"127.0.0.1:{CLOSED_PORT}",
    "MX_SERVER_DEADLINE_SECONDS": "0.2",
    "MX_RETRY_ATTEMPTS": "1",
    "MODEL_EXPRESS_SERVER_HOST": "127.0.0.1",
    "MODEL_EXPRESS_SERVER_PORT": "0",
    "MODEL_EXPRESS_SERVER_METRICS_PORT": "0",
    "HF_HUB_OFFLINE": "1",
}


def said(app: Any, arguments: list[str], environ: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> str:
    """All that the command says."""
    for name in [*os.environ]:
        if name not in {"PATH", "HOME", "LANG", "TMPDIR", "PYTHONPATH"}:
            monkeypatch.delenv(name)
    for name, value in {**QUIET, **environ}.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(app, ["--log-level", "debug", *arguments])
    problem = done.exception
    assert problem is None or isinstance(problem, SystemExit), (arguments, environ, problem)
    return done.output + done.stderr


def planted(cls: type, url: str) -> dict[str, str]:
    """A value for each variable of ``cls``: a secret where one belongs, and a URL that does not belong elsewhere."""
    return {name: SECRET if variable.secret else url for _, variable in fields(cls) for name in variable.names}


@pytest.mark.parametrize("kind", URLS)
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_no_description_shows_a_secret_in_a_variable(cls: type, kind: str) -> None:
    """Neither its value nor the problem with it, each variable by itself; nor does the error of a class."""
    for name, value in planted(cls, URLS[kind]).items():
        for row in describe(cls, {name: value}, owner="test"):
            assert SECRET not in str(row), (name, row)
        with contextlib.suppress(mx.SettingsError):
            from_env(cls, {name: value})
            continue
        with pytest.raises(mx.SettingsError) as raised:
            from_env(cls, {name: value})
        assert SECRET not in f"{raised.value} {raised.value.message}", name


def readers(cls: type, model: str) -> list[list[str]]:
    """Commands that read variables of ``cls``."""
    names = list(planted(cls, ""))
    commands = [["settings"], ["settings", "--json"]]
    if cls in CORE_SETTINGS:
        commands += [["plugins"], ["inspect", model], ["doctor", model], ["load", model, "--json"]]
    elif any(name.startswith("AWS_") for name in names):
        commands += [["doctor", "s3://bucket/model", "--timeout", "0.5"], ["inspect", "s3://bucket/model", "--json"]]
    elif "MX_MODEL_URI" in names:
        commands += [["explain-vllm", "some/model"], ["explain-vllm", "some/model", "--json"]]
    else:
        commands += [["health"], ["sources", "--json"], ["serve", "--check"]]
    return commands


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_no_command_shows_a_secret_in_a_variable(
    cls: type, app: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With all variables of a class set, and with each that can be used then."""
    everything = planted(cls, URL)
    usable = {row.name: everything[row.name] for row in describe(cls, everything, owner="test") if not row.problem}
    for environ in (everything, usable):
        for command in readers(cls, model):
            with monkeypatch.context() as patched:
                text = said(app, command, environ, patched)

            assert SECRET not in text, f"mx {' '.join(command)}:\n{text}"


#: Values of arguments that are not under test.
USUAL = {"uri": "MODEL", "model": "MODEL", "directory": "OUT"}


def commands_of(app: Any) -> dict[str, Any]:
    """By the words after ``mx``; those of groups have two."""
    group: Any = typer.main.get_command(app)
    found = {}
    for name, command in group.commands.items():
        below = getattr(command, "commands", None)
        found |= {f"{name} {word}": each for word, each in below.items()} if below else {name: command}
    return found


def arguments_of(app: Any) -> Iterator[tuple[str, str]]:
    """Command and parameter, for each parameter that takes text or a path."""
    for name, command in sorted(commands_of(app).items()):
        for parameter, hint in typing.get_type_hints(inspect.unwrap(command.callback)).items():
            if {str, Path} & {hint, *typing.get_args(hint)}:
                yield name, parameter


def test_every_command_has_its_arguments_in_the_matrix(app: Any) -> None:
    """Otherwise the test below would test nothing."""
    found = set(arguments_of(app))

    assert {
        ("load", "uri"),
        ("load", "device"),
        ("load", "digests"),
        ("pull", "uri"),
        ("pull", "directory"),
        ("inspect", "uri"),
        ("doctor", "uri"),
        ("serve", "host"),
        ("serve", "metadata"),
        ("serve", "config"),
        ("serve", "log_format"),
        ("health", "url"),
        ("sources", "url"),
        ("sources", "model"),
        ("explain", "model"),
        ("explain", "uri"),
        ("explain-vllm", "model"),
        ("models download", "model"),
        ("models import", "directory"),
        ("models list", "url"),
        ("models list", "cache_dir"),
    } <= found


@pytest.mark.parametrize("kind", [kind for kind in URLS if kind != "no scheme"])  # which is the name of a file
def test_no_command_shows_a_secret_in_an_argument(
    kind: str, app: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As text and as JSON, where the command has it."""
    monkeypatch.chdir(tmp_path)
    variables = {"MODEL_EXPRESS_CACHE_DIRECTORY": str(tmp_path / "cache")}
    for command, planted in arguments_of(app):
        parameters = commands_of(app)[command].params
        line = command.split()
        for parameter in parameters:
            if parameter.name == planted:
                line += [URLS[kind]] if parameter.param_type_name == "argument" else [parameter.opts[0], URLS[kind]]
            elif parameter.param_type_name == "argument" and parameter.required:
                line.append({"MODEL": model, "OUT": str(tmp_path / "out")}[USUAL[parameter.name]])
        ways = [["--check"]] if command == "serve" else [["--dry-run"]] if command == "vllm" else [[]]
        if any(parameter.name == "json_output" for parameter in parameters):
            ways.append(["--json"])
        for more in ways:
            with monkeypatch.context() as patched:
                text = said(app, [*line, *more], variables, patched)

            assert SECRET not in text, f"mx {' '.join([*line, *more])}:\n{text}"


def test_the_log_level_shows_no_secret_either(app: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option of ``mx`` itself."""
    for url in URLS.values():
        done = CliRunner().invoke(app, ["--log-level", url, "plugins"])

        assert 2 == done.exit_code
        assert SECRET not in done.output + done.stderr


def test_what_is_no_secret_is_shown(app: Any, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths with at signs, question marks and equals signs, and the public part of a URL."""
    environ = {
        "MX_TLS_CA_PATH": "/home/alice@example/ca.pem",
        "MX_DISCOVERY": "server://example:8001",
        "AWS_SHARED_CREDENTIALS_FILE": "/what?/is it",
    }

    text = said(app, ["settings"], environ, monkeypatch)

    for value in environ.values():
        assert re.search(re.escape(value), text)
