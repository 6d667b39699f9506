"""``mx models``: shows and manages the models in a cache: that of a server, or a directory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import attrs
import typer
from attrs import frozen
from rich.progress import Progress
from rich.table import Table

from modelexpress_core.cli.interruption import signal_exit_code
from modelexpress_core.cli.output import (
    JsonOption,
    console,
    errors_reported,
    package_missing,
    print_json,
    progress_bars,
    silence_grpc,
    status_console,
    verbatim,
)
from modelexpress_core.errors import InvalidURIError, ModelExpressError, UnsupportedError
from modelexpress_core.plugins import STORAGE, PluginManager
from modelexpress_core.report import format_bytes
from modelexpress_core.server.settings import directory_path
from modelexpress_core.uri import ModelURI

if TYPE_CHECKING:
    from modelexpress_core.server.cache import ModelCache, Snapshot
    from modelexpress_core.sources.cache_management import CacheManagement
    from modelexpress_core.wire.proto.modelexpress import cache_pb2

__all__ = ["Damaged", "ListedModel", "ModelsAt", "models"]

#: Digits of a version that tables show.
_VERSION_DIGITS = 12

_MINUTE, _HOUR, _DAY = 60, 3600, 86400


@frozen
class ListedModel:
    """One version of a model in a cache.

    Attributes:
        model: Its name: ``"org/name"``, ``"s3/bucket/model"``.
        version: The version.
        revision: What was asked for when it was downloaded; empty for the default.
        source: Redacted URI that it comes from.
        weights: Whether files of weights are part of it.
        files: How many files it has.
        bytes: Their bytes.
        present_bytes: Those of them that have arrived.
        complete: Whether all have, and were verified.
        in_use: Whether somebody reads it, or has a moment ago: it is not removed to keep limits.
        idle_seconds: How long ago it was read last.
        error: Why its download failed; empty if it did not.
    """

    model: str
    version: str
    revision: str
    source: str
    weights: bool
    files: int
    bytes: int
    present_bytes: int
    complete: bool
    in_use: bool
    idle_seconds: float
    error: str = ""


@frozen
class Damaged:
    """A file that is not what was downloaded.

    Attributes:
        path: Its path below the model.
        reason: What is wrong.
    """

    path: str
    reason: str


class ModelsAt(Protocol):
    """A cache, wherever it is."""

    def models(self) -> Sequence[ListedModel]:
        """All versions, those first that were read last."""
        ...

    def stats(self) -> dict[str, Any]:
        """What the cache holds and did, by name."""
        ...

    def download(
        self, model: str, revision: str, *, weights: bool, on_progress: Callable[[int, int], None]
    ) -> ListedModel:
        """Download a model, if it is not there; ``on_progress`` gets the bytes that are there, and all bytes."""
        ...

    def validate(self, model: str, version: str, on_progress: Callable[[int, int], None]) -> Sequence[Damaged]:
        """Compare all files of a version (empty: of all versions) with their digests; returns the damaged ones."""
        ...

    def remove(self, model: str, version: str) -> tuple[int, int]:
        """Remove a version (empty: all versions); returns how many were removed, and the bytes that were freed."""
        ...


class _Directory:
    """A directory that no server uses now."""

    def __init__(self, cache: ModelCache) -> None:
        self._cache = cache

    def models(self) -> Sequence[ListedModel]:
        return [self._listed(snapshot, idle) for snapshot, idle in self._cache.snapshots()]

    def stats(self) -> dict[str, Any]:
        stats = attrs.asdict(self._cache.stats())
        return {name: stats[name] for name in ("directory", "models", "size_bytes", "limit_bytes", "free_bytes")}

    def download(
        self, model: str, revision: str, *, weights: bool, on_progress: Callable[[int, int], None]
    ) -> ListedModel:
        snapshot = self._cache.begin(model, revision=revision or None, weights=weights)
        while not snapshot.wait(0.2):
            on_progress(snapshot.present_bytes, snapshot.size_bytes)
        return self._listed(snapshot, 0.0)

    def validate(self, model: str, version: str, on_progress: Callable[[int, int], None]) -> Sequence[Damaged]:
        chosen = self._chosen(model, version)
        whole = sum(snapshot.size_bytes for snapshot in chosen)
        done = 0
        damaged: list[Damaged] = []
        for snapshot in chosen:

            def progress(nbytes: int, before: int = done) -> None:
                on_progress(before + nbytes, whole)

            damaged += [Damaged(each.path, each.reason) for each in self._cache.validate(snapshot, progress)]
            done += snapshot.size_bytes
        return damaged

    def remove(self, model: str, version: str) -> tuple[int, int]:
        chosen = self._chosen(model, version)
        return len(chosen), sum(self._cache.remove(snapshot) for snapshot in chosen)

    def fill(self, directory: str, model: str, revision: str, on_progress: Callable[[int, int], None]) -> ListedModel:
        """Import a directory."""
        begun: list[Snapshot] = []
        snapshot = self._cache.import_directory(directory, model, revision=revision or None, on_begin=begun.append)
        on_progress(snapshot.size_bytes, snapshot.size_bytes)
        return self._listed(snapshot, 0.0)

    def _chosen(self, model: str, version: str) -> Sequence[Snapshot]:
        """The versions of a model that were asked for, by the whole of their names or its beginning."""
        name = self._cache.place(model).name
        of_model = [snapshot for snapshot, _ in self._cache.snapshots() if snapshot.place == name]
        chosen = [snapshot for snapshot in of_model if snapshot.version.startswith(version)]
        if not chosen:
            known = ", ".join(snapshot.version[:_VERSION_DIGITS] for snapshot in of_model)
            raise ModelExpressError(
                f"{model} is not in the cache" + (f" at {version}: its versions are {known}" if known else ""),
                hint="list what is there with mx models list",
            )
        return chosen

    def _listed(self, snapshot: Snapshot, idle_seconds: float) -> ListedModel:
        return ListedModel(
            snapshot.place.removeprefix("hf/"),
            snapshot.version,
            snapshot.revision,
            snapshot.source,
            snapshot.weights,
            len(snapshot.files),
            snapshot.size_bytes,
            snapshot.present_bytes,
            snapshot.complete,
            self._cache.in_use(snapshot.key),
            round(idle_seconds, 1),
            str(snapshot.error or ""),
        )


class _Server:
    """The cache of a server."""

    def __init__(self, client: CacheManagement) -> None:
        self._client = client

    def models(self) -> Sequence[ListedModel]:
        return [_listed(each) for each in self._client.models()]

    def stats(self) -> dict[str, Any]:
        answer = self._client.stats()
        found = {each.name: getattr(answer, each.name) for each in answer.DESCRIPTOR.fields}
        return {**found, "limit_bytes": found["limit_bytes"] or None}

    def download(
        self, model: str, revision: str, *, weights: bool, on_progress: Callable[[int, int], None]
    ) -> ListedModel:
        place, version = self._client.ensure(model, revision, weights=weights, on_progress=on_progress)
        chosen = [each for each in self._client.versions(place, version) if each.weights or not weights]
        return _listed(chosen[0])

    def validate(self, model: str, version: str, on_progress: Callable[[int, int], None]) -> Sequence[Damaged]:
        damaged: list[Damaged] = []
        for each in self._client.versions(model, version):
            found = self._client.validate(model, each.version, on_progress)
            damaged += [Damaged(file.path, file.reason) for file in found]
        return damaged

    def remove(self, model: str, version: str) -> tuple[int, int]:
        counts = [self._client.remove(model, each.version) for each in self._client.versions(model, version)]
        return sum(removed for removed, _ in counts), sum(freed for _, freed in counts)


def _listed(model: cache_pb2.CachedModel) -> ListedModel:
    return ListedModel(
        model.place.removeprefix("hf/"),
        model.version,
        model.revision,
        model.source,
        model.weights,
        model.files,
        model.size_bytes,
        model.present_bytes,
        model.complete,
        model.in_use,
        round(model.idle_seconds, 1),
        model.error,
    )


# -- the commands ------------------------------------------------------------------------------------------------------

UrlOption = Annotated[
    str | None,
    typer.Option("--url", help="Ask this server; by default MODEL_EXPRESS_URL.", metavar="URL", show_default=False),
]

CacheOption = Annotated[
    str | None,
    typer.Option(
        "--cache-dir",
        help="Work on this directory, which no server uses meanwhile; by default MODEL_EXPRESS_CACHE_DIRECTORY, if no "
        "server is named.",
        metavar="DIR",
        show_default=False,
    ),
]

ModelArgument = Annotated[
    str, typer.Argument(help="org/name, or a URI: hf://org/name, s3://bucket/model.", metavar="MODEL")
]

RevisionOption = Annotated[
    str, typer.Option("--revision", help="A branch, tag or commit.", metavar="REVISION", show_default=False)
]

VersionOption = Annotated[
    str,
    typer.Option(
        "--version",
        help="One version, or the beginning of its name; all versions by default.",
        metavar="VERSION",
        show_default=False,
    ),
]


def models() -> typer.Typer:
    """Return the group of commands."""
    app = typer.Typer(no_args_is_help=True, help="Show and manage the models in a cache.")
    app.command("list")(errors_reported(list_models))
    app.command("download")(errors_reported(download))
    app.command("import")(errors_reported(import_directory))
    app.command("validate")(errors_reported(validate))
    app.command("remove")(errors_reported(remove))
    app.command("stats")(errors_reported(stats))
    return app


def list_models(cache_dir: CacheOption = None, url: UrlOption = None, json_output: JsonOption = False) -> None:
    """List the models in the cache, those first that were read last."""
    with _cache(cache_dir, url) as cache:
        found = cache.models()
    if json_output:
        print_json([attrs.asdict(each) for each in found])
        return
    if not found:
        console().print("The cache has no models.")
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("model", "version", "files", "size", "state", "read"):
        table.add_column(heading, overflow="fold", justify="right" if heading in {"files", "size"} else "left")
    for each in found:
        state = "complete" if each.complete else f"{100 * each.present_bytes // max(1, each.bytes)} % there"
        table.add_row(
            verbatim(each.model),
            verbatim(each.version[:_VERSION_DIGITS]),
            str(each.files),
            format_bytes(each.bytes),
            state if each.weights else f"{state}, no weights",
            _ago(each.idle_seconds),
        )
    console().print(table)


def download(
    model: ModelArgument,
    *,
    revision: RevisionOption = "",
    no_weights: Annotated[bool, typer.Option("--no-weights", help="Leave out files of weights.")] = False,
    cache_dir: CacheOption = None,
    url: UrlOption = None,
    json_output: JsonOption = False,
) -> None:
    """Download a model into the cache, unless it is there. Run again to resume."""
    with _cache(cache_dir, url) as cache, _bar(f"downloading {model}") as progress:
        found = cache.download(_place(model), revision, weights=not no_weights, on_progress=progress)
    _print_model(found, json_output=json_output, done="in the cache")


def import_directory(
    directory: Annotated[str, typer.Argument(help="The directory with the files of the model.", metavar="DIR")],
    model: ModelArgument,
    revision: RevisionOption = "",
    cache_dir: CacheOption = None,
    json_output: JsonOption = False,
) -> None:
    """Fill the cache from a directory, where there is no network.

    A model of the Hub needs the commit that the files are of, with --revision, or as the name of the directory.
    """
    with _cache(cache_dir, None, only_directory="import") as cache, _bar(f"importing {model}") as progress:
        assert isinstance(cache, _Directory)  # noqa: S101 - for the type checker: no server was allowed
        found = cache.fill(directory, _place(model), revision, progress)
    _print_model(found, json_output=json_output, done="imported")


def validate(
    model: ModelArgument,
    version: VersionOption = "",
    cache_dir: CacheOption = None,
    url: UrlOption = None,
    json_output: JsonOption = False,
) -> None:
    """Compare all files of a model with their digests. A damaged version is downloaded again when it is asked for."""
    with _cache(cache_dir, url) as cache, _bar(f"comparing {model}") as progress:
        damaged = cache.validate(_place(model), version, progress)
    if json_output:
        print_json({"model": model, "damaged": [attrs.asdict(each) for each in damaged]})
    for each in damaged if not json_output else ():
        console().print(f"[red]{verbatim(each.path)}[/red] {verbatim(each.reason)}")
    if not damaged and not json_output:
        console().print(f"{verbatim(model)}: all files have their digests")
    if damaged:
        raise typer.Exit(1)


def remove(
    model: ModelArgument,
    version: VersionOption = "",
    cache_dir: CacheOption = None,
    url: UrlOption = None,
    json_output: JsonOption = False,
) -> None:
    """Remove a model from the cache. What other versions share stays."""
    with _cache(cache_dir, url) as cache:
        versions, freed = cache.remove(_place(model), version)
    if json_output:
        print_json({"model": model, "removed": versions, "freed_bytes": freed})
    else:
        word = "version" if versions == 1 else "versions"
        console().print(f"removed {versions} {word} of {verbatim(model)}: {format_bytes(freed)}")


def stats(cache_dir: CacheOption = None, url: UrlOption = None, json_output: JsonOption = False) -> None:
    """Show what the cache holds, and what it has downloaded, sent and removed."""
    with _cache(cache_dir, url) as cache:
        found = cache.stats()
    if json_output:
        print_json(found)
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in found.items():
        shown = "none" if value is None else format_bytes(value) if name.endswith("_bytes") else str(value)
        table.add_row(name.removesuffix("_bytes").replace("_", " "), verbatim(shown))
    console().print(table)


# -- which cache -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _cache(cache_dir: str | None, url: str | None, *, only_directory: str = "") -> Iterator[ModelsAt]:
    """The cache that the options name, or the environment: a server before a directory."""
    silence_grpc()
    server = url or ("" if cache_dir or only_directory else os.environ.get("MODEL_EXPRESS_URL"))
    if cache_dir and url:
        message = "--cache-dir and --url exclude each other"
        raise typer.BadParameter(message)
    directory = cache_dir or os.environ.get("MODEL_EXPRESS_CACHE_DIRECTORY")
    try:
        directory = directory and directory_path(directory)
    except ValueError as exc:
        raise typer.BadParameter(str(exc), param_hint="--cache-dir") from exc
    try:
        if server:
            with _open_server(server) as cache:
                yield cache
        elif directory:
            with _open_directory(directory) as cache:
                yield cache
        else:
            raise UnsupportedError(
                "it is not known which cache is meant",
                cause="neither a server nor a directory is named",
                hint="give --cache-dir DIR" if only_directory else "give --url URL or --cache-dir DIR",
            )
    except KeyboardInterrupt as exc:
        status_console().print("Interrupted. What has arrived stays; run the same command again.", style="red")
        raise typer.Exit(signal_exit_code(exc)) from None


@contextlib.contextmanager
def _open_directory(directory: str) -> Iterator[ModelsAt]:
    try:
        from modelexpress_core.server.cache import ModelCache
    except ModuleNotFoundError as exc:
        what = "a cache"
        raise package_missing(what, exc) from exc
    from modelexpress_core.server.settings import CacheSettings
    from modelexpress_core.settings import from_env

    # Whoever runs the command decides by it what is downloaded: the limits of callers of a server are not theirs.
    plugins = PluginManager.discover()
    sources = tuple(sorted(plugins.table(STORAGE).schemes))
    settings = attrs.evolve(from_env(CacheSettings, os.environ), sources=sources)
    with ModelCache(directory, settings=settings, plugins=plugins) as cache:
        yield _Directory(cache)


@contextlib.contextmanager
def _open_server(url: str) -> Iterator[ModelsAt]:
    try:
        from modelexpress_core.sources.cache_management import CacheManagement
    except ModuleNotFoundError as exc:
        what = "a call to the server"
        raise package_missing(what, exc) from exc

    with CacheManagement.from_env(url) as client:
        yield _Server(client)


def _place(model: str) -> str:
    """What a server calls a model that the user named by a URI, or as the Hub does."""
    if "://" not in model:
        return model
    from modelexpress_core.server.cache.places import place_of

    uri = ModelURI.parse(model)
    if uri.query:
        message = f"the URI {uri} has a query"
        raise InvalidURIError(message, hint="give the revision with --revision")
    return place_of(uri)


# -- output ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _bar(description: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar with rate and time left if there is a terminal; gives the function that moves it on."""
    progress: Progress | None = progress_bars()
    if progress is None:
        yield lambda _done, _whole: None
        return
    with progress:
        task = progress.add_task(verbatim(description), total=None)
        yield lambda done, whole: progress.update(task, completed=done, total=whole)


def _print_model(found: ListedModel, *, json_output: bool, done: str) -> None:
    if json_output:
        print_json(attrs.asdict(found))
        return
    text = f"{found.model} at {found.version[:_VERSION_DIGITS]}: {found.files} files, {format_bytes(found.bytes)}"
    console().print(verbatim(f"{text}, {done}"))


def _ago(seconds: float) -> str:
    for unit, name in ((_DAY, "d"), (_HOUR, "h"), (_MINUTE, "min")):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name} ago"
    return f"{seconds:.0f} s ago"
