"""Models of the Hugging Face Hub that vLLM gets from the cache of the server, before it resolves their names.

vLLM asks the Hub for configuration and tokenizer of a name. Where the server's cache is used, the name is replaced by a
directory: one of the cache, if the disk is shared, else a private one that has all files but the weights, which are
then streamed. The path of the private directory says which commit of which model it is, as the paths of the Hub's own
cache do. So each worker knows what to stream, in whichever process and on whichever host it runs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

from attrs import frozen

from modelexpress_core import ModelExpressError, ModelURI, PluginManager
from modelexpress_core.contracts.candidates import LoadRequest, Skipped
from modelexpress_core.copying.selection import WEIGHT_SUFFIXES
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import BackendError, CheckpointError, SettingsError
from modelexpress_core.messages import printable
from modelexpress_core.plugins import STORAGE
from modelexpress_core.report import format_bytes
from modelexpress_core.settings import from_env
from modelexpress_core.sources.server_cache import SERVER_VARIABLES, cache_candidates, cache_uri
from modelexpress_core.sources.settings import SharedCacheSettings
from mx_vllm._directories import cache_directory, make_private
from mx_vllm._names import content_of_snapshot
from mx_vllm._small_files import CONFIGURATIONS, copy_small_files, has_all_weights
from mx_vllm.settings import VllmSettings

if TYPE_CHECKING:
    from modelexpress_core.sources.cache_client import CachedModel

__all__ = [
    "HubName",
    "Names",
    "ServerPlace",
    "directories_from_server",
    "find_in_cache",
    "hub_directory",
    "is_cache_used",
    "is_from_server",
    "streamed_uri",
    "why_in_cache",
    "why_not_in_cache",
    "without_cache",
]

# A child of vLLM's logger, so that vLLM's log settings apply.
_log = logging.getLogger("vllm.modelexpress")

#: https://huggingface.co/docs/huggingface_hub: names of organisations and repositories have up to 96 characters, and
#: neither of the pairs below.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}/[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_PAIRS = re.compile(r"\.\.|--")
_COMMIT = re.compile(r"[0-9a-f]{40}")

#: The directory of private directories, below that of ModelExpress, and what their paths look like.
_PRIVATE = "without-weights"
_PRIVATE_PATH = re.compile(
    rf"/modelexpress/{_PRIVATE}/models--(?P<name>[^/]+)/snapshots/(?P<commit>{_COMMIT.pattern})/?$"
)

#: Bytes of all files but weights: tokenizers have some tens of MB.
_MAX_SMALL_BYTES = 1 << 30


@frozen
class HubName:
    """A model or tokenizer that vLLM is asked for.

    Attributes:
        name: Its name on the Hub.
        revision: Branch, tag or commit; None for the default branch.
        download_directory: Where vLLM downloads weights to, if not to the cache of the Hub.
        weights: Whether it is a model; else a tokenizer alone.
    """

    name: str
    revision: str | None = None
    download_directory: str | None = None
    weights: bool = True


class Names(Protocol):
    """What the arguments of an engine that starts name."""

    @property
    def offline(self) -> bool:
        """Whether vLLM may not ask the Hub."""

    def hub_names(self) -> list[HubName]:
        """What the arguments name."""

    def replace(self, name: str, directory: str) -> None:
        """Let the engine use ``directory`` for ``name``; it is served under its name nevertheless."""


@contextlib.contextmanager
def directories_from_server(names: Names, environ: Mapping[str, str] | None = None) -> Iterator[None]:
    """Replace each name that the server's cache has by a directory; the engine starts in the block.

    If the server fails, vLLM asks the Hub in the block, unless HF_HUB_OFFLINE or MX_FALLBACK=0 forbids that.

    Raises:
        ModelExpressError: The server has failed, and the Hub too; the message gives both reasons.
    """
    environ = os.environ if environ is None else environ
    failure: ModelExpressError | None = None
    for each in names.hub_names():
        if not is_from_server(each, environ):
            continue
        try:
            names.replace(each.name, _directory_of(each, environ))
        except SettingsError:
            raise
        except ModelExpressError as exc:
            failure = _failure(each.name, exc)
            if names.offline or from_env(VllmSettings, environ).fallback is False:
                raise failure from exc
            _log.warning("%s; vLLM asks the Hugging Face Hub", failure.headline)
            break
    try:
        yield
    except Exception as exc:
        if failure is None:
            raise
        message = f"{failure.headline}; and vLLM cannot start with what the Hugging Face Hub gives"
        cause = f"{failure.cause}; vLLM says: {exc}" if failure.cause else f"vLLM says: {exc}"
        raise ModelExpressError(message, cause=cause, hint=failure.hint) from exc


def _failure(name: str, exc: ModelExpressError) -> ModelExpressError:
    message = f"configuration and tokenizer of {name} do not come from the server: {exc.headline}"
    hint = exc.hint or "look into the log of the server; `mx doctor` examines it"
    return ModelExpressError(message, cause=exc.cause, hint=hint)


def is_from_server(each: HubName, environ: Mapping[str, str]) -> bool:
    """Return whether the server's cache is asked for a name: variables say that it is used, and it is not here yet."""
    if environ.get("VLLM_USE_MODELSCOPE", "").strip().lower() in {"1", "true"}:
        return False
    if not _NAME.fullmatch(each.name) or _PAIRS.search(each.name) or os.path.exists(each.name):
        return False
    if not is_cache_used(environ):
        return False
    return hub_directory(each, weights=each.weights and not environ.get("MX_MODEL_URI")) is None


def hub_directory(each: HubName, *, weights: bool = True) -> str | None:
    """Return the directory of a name in the Hub's cache on this machine; None if files are missing there.

    Args:
        each: The name.
        weights: Whether all weights must be there too, which a download that was broken off has not left.
    """
    found = _snapshot(each, None)
    if found is None:
        return None
    if each.weights and not any(os.path.exists(os.path.join(found, name)) for name in CONFIGURATIONS):
        return None
    elsewhere = _snapshot(each, each.download_directory) if weights and each.download_directory else None
    return found if not weights or any(map(has_all_weights, filter(None, (found, elsewhere)))) else None


def _snapshot(each: HubName, cache_dir: str | None) -> str | None:
    with contextlib.suppress(Exception):  # not installed, unknown name, not downloaded
        from huggingface_hub import snapshot_download

        return str(snapshot_download(each.name, revision=each.revision, cache_dir=cache_dir, local_files_only=True))
    return None


def is_cache_used(environ: Mapping[str, str]) -> bool:
    """Return whether variables name a server and say that loads use its cache.

    Raises:
        SettingsError: A variable is not valid.
    """
    settings = from_env(SharedCacheSettings, environ)
    return _server_of(environ) != "" and (settings.no_shared_storage or settings.directory is not None)


def without_cache(environ: Mapping[str, str]) -> dict[str, str]:
    """Return ``environ`` without the variables that say that loads use the cache."""
    return {
        **environ,
        "MODEL_EXPRESS_NO_SHARED_STORAGE": "0",
        "MODEL_EXPRESS_CACHE_DIRECTORY": "",
    }


def why_in_cache(uri: str, environ: Mapping[str, str]) -> str:
    """Return a reason if ``uri`` is in the cache of the server: which one, and how it is read; empty if it is not."""
    if uri.startswith(("mx://", "mxs://")):
        return "the server's cache has it"
    directory = environ.get("MODEL_EXPRESS_CACHE_DIRECTORY", "").strip()
    if directory and uri.startswith(f"{ModelURI('file', path=os.path.realpath(directory))}/"):
        return "the server's cache has it, in MODEL_EXPRESS_CACHE_DIRECTORY"
    return ""


def why_not_in_cache(uri: str, environ: Mapping[str, str]) -> str:
    """Return why the server's cache is not asked for ``uri``; empty if it is asked, or if that needs no words."""
    elsewhere = "://" in uri and not uri.startswith(("file://", "mx://", "mxs://"))
    return "no variable says so" if elsewhere and _server_of(environ) and not is_cache_used(environ) else ""


def streamed_uri(model: str, environ: Mapping[str, str] | None = None) -> str | None:
    """Return where to read the weights of vLLM's ``model`` from; None unless it is one of our private directories.

    Raises:
        SettingsError: No variable names the server.
        InvalidURIError: The address of the server is not valid.
    """
    match = _PRIVATE_PATH.search(os.path.abspath(model)) if "://" not in model else None
    if match is None:
        return None
    environ = os.environ if environ is None else environ
    return str(_streamed(match["name"].replace("--", "/", 1), match["commit"], environ))


def _streamed(name: str, revision: str | None, environ: Mapping[str, str]) -> ModelURI:
    url = _server_of(environ)
    if not url:
        message = f"the weights of {name} are streamed from the server, and no variable names it"
        raise SettingsError(message, hint="set MODEL_EXPRESS_URL in all processes of vLLM")
    return cache_uri(Endpoint.parse(url), _hub_uri(name, revision))


def _server_of(environ: Mapping[str, str]) -> str:
    return next((text for name in SERVER_VARIABLES if (text := environ.get(name, "").strip())), "")


def _hub_uri(name: str, revision: str | None) -> ModelURI:
    organisation, _, repository = name.partition("/")
    return ModelURI("hf", organisation, repository, {"revision": revision} if revision else {})


@frozen
class ServerPlace:
    """Where a model of the Hub is in the server's cache.

    Attributes:
        uri: Its weights.
        content_version: That of the commit.
        directory: The directory of the cache that vLLM reads on a common disk; None if weights are streamed.
    """

    uri: ModelURI
    content_version: str
    directory: str | None = None


def find_in_cache(
    each: HubName,
    plugins: PluginManager,
    environ: Mapping[str, str],
    on_skipped: Callable[[Skipped], None] | None = None,
) -> ServerPlace:
    """Return where vLLM gets a model from; the server downloads it if it is not cached.

    Args:
        each: The model.
        plugins: Plugins to use.
        environ: Variables that name the server.
        on_skipped: Gets the reason why a common disk is not used. With it, nothing waits for the end of a download.

    Raises:
        ModelExpressError: The server does not give it.
    """
    asked = _streamed(each.name, each.revision, environ)
    plugins.table(STORAGE).lookup(asked.scheme)  # the error of a missing package says how to install it
    if not from_env(SharedCacheSettings, environ).no_shared_storage:
        request = LoadRequest(_hub_uri(each.name, each.revision), on_skipped=on_skipped)
        for candidate in cache_candidates(plugins, environ, request):
            if candidate.uri.scheme == "file":
                path = candidate.uri.path
                return ServerPlace(candidate.uri, content_of_snapshot(path), path)
    version = _open(each, asked, environ).version
    return ServerPlace(_streamed(each.name, version, environ), f"hub:{each.name}@{version}")


def _open(each: HubName, asked: ModelURI, environ: Mapping[str, str]) -> CachedModel:
    from modelexpress_core.sources.cache_client import CacheClient

    with CacheClient.from_env(_server_of(environ), environ) as client:
        try:
            model = client.open(asked.path, revision=each.revision or "")
        except BackendError as exc:
            exc.uri, exc.operation = str(asked), "open the model"
            raise
    _check(each.name, model.version, model.sizes)
    return model


def _directory_of(each: HubName, environ: Mapping[str, str]) -> str:
    """Return the directory of a model, with its files.

    Raises:
        ModelExpressError: The server does not give them.
    """
    plugins = PluginManager.discover(environ)
    place = find_in_cache(each, plugins, environ)
    if place.directory is not None:
        _log.info("ModelExpress uses %s in MODEL_EXPRESS_CACHE_DIRECTORY for %s", place.directory, each.name)
        return place.directory
    commit = place.uri.query["revision"]
    root = cache_directory() / _PRIVATE
    make_private(root)
    directory = root / f"models--{each.name.replace('/', '--')}" / "snapshots" / commit
    report = copy_small_files(place.uri, directory, plugins)
    _log.info(
        "ModelExpress got configuration and tokenizer of %s (%d files, %s, of commit %s) from the cache of the server "
        "at %s; its weights are streamed from there",
        each.name,
        report.files,
        format_bytes(report.bytes),
        commit[:12],
        place.uri.authority,
    )
    return str(directory)


def _check(name: str, version: str, sizes: Mapping[str, int]) -> None:
    """Refuse what cannot be a model of the Hub, before a byte of it is copied."""
    if not _COMMIT.fullmatch(version):
        message = f"the server has the version {printable(version)[:128]!r} of {name}, which is no commit"
        raise CheckpointError(message, cause="it is another kind of server", hint="check MODEL_EXPRESS_URL")
    small = sum(size for file, size in sizes.items() if not file.lower().endswith(WEIGHT_SUFFIXES))
    if small > _MAX_SMALL_BYTES:
        limit = format_bytes(_MAX_SMALL_BYTES)
        message = f"{name} has {format_bytes(small)} besides its weights, and at most {limit} are copied"
        hint = f"copy what is needed to a directory, and serve that with MX_MODEL_URI=hf://{name}"
        raise CheckpointError(message, hint=hint)
