"""The cache of the configured server as a place to load from: its files on a common disk, or streamed."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence

import attrs

from modelexpress_core.contracts.candidates import Candidate, LoadRequest, Tier
from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import ModelExpressError
from modelexpress_core.plugins import STORAGE, TRANSPORT, PluginManager
from modelexpress_core.report import format_bytes
from modelexpress_core.settings import from_env
from modelexpress_core.sources.settings import SharedCacheSettings
from modelexpress_core.uri import ModelURI

__all__ = ["SERVER_VARIABLES", "cache_candidates", "cache_uri", "streamed_candidate"]

_log = logging.getLogger(__name__)

#: The variables that name the server.
SERVER_VARIABLES = ("MODEL_EXPRESS_URL", "MX_SERVER_ADDRESS")

#: What the place is called where it is left out.
_NAME = "the cache of the server"

#: Parameters of a URI that a server is told.
_PARAMETERS = frozenset({"revision"})


def cache_uri(server: Endpoint, uri: ModelURI) -> ModelURI:
    """The URI by which ``server`` is asked for what ``uri`` names."""
    path = "/".join(filter(None, (uri.scheme, uri.authority, uri.path.strip("/"))))
    return ModelURI("mxs" if server.tls else "mx", server.target, path, uri.query)


def cache_candidates(plugins: PluginManager, environ: Mapping[str, str], request: LoadRequest) -> Sequence[Candidate]:
    """The places of a load in the cache of the server: none unless variables say that it is used.

    With a common directory, this has the server download the model, and waits until it is complete.

    Args:
        plugins: Say which schemes are whose.
        environ: Variables that name the server, and say whether its cache is used.
        request: What to load. ``request.on_skipped`` gets the reason why the cache is left out.

    Raises:
        SettingsError: A variable is not valid.
        InvalidURIError: The address of the server is not valid.
    """
    url = next((text for name in SERVER_VARIABLES if (text := environ.get(name, "").strip())), "")
    settings = from_env(SharedCacheSettings, environ)
    if not url:
        return ()
    unfit = _why_not(plugins, request.uri)
    if not settings.no_shared_storage and settings.directory is None:
        hint = "set MODEL_EXPRESS_NO_SHARED_STORAGE=1, or MODEL_EXPRESS_CACHE_DIRECTORY to a directory that both have"
        if unfit is None:
            request.skip(_NAME, "no variable says that it is used", hint)
        return ()
    if unfit is not None:
        if unfit:
            request.skip(_NAME, unfit)
        return ()
    streamed = Candidate(cache_uri(Endpoint.parse(url), request.uri), SERVER_VARIABLES[0])
    if settings.no_shared_storage or settings.directory is None:
        return (streamed,)
    try:
        shared = _shared(url, streamed.uri, settings.directory, environ, request)
    except ModelExpressError as exc:
        _log.warning("the cache of the server is not used: %s", exc.headline)
        request.skip(str(streamed.uri), exc.headline, exc.hint or "")
        return ()
    return (streamed,) if shared is None else (shared, streamed)


def streamed_candidate(plugins: PluginManager, environ: Mapping[str, str], request: LoadRequest) -> Candidate | None:
    """The place of a load in the cache of the server, if variables say that it streams from there; asks nobody.

    Args:
        plugins: Say which schemes are whose.
        environ: As for ``cache_candidates``.
        request: What to load.

    Raises:
        SettingsError: A variable is not valid.
        InvalidURIError: The address of the server is not valid.
    """
    if not from_env(SharedCacheSettings, environ).no_shared_storage:
        return None
    candidates = cache_candidates(plugins, environ, attrs.evolve(request, on_skipped=None))
    return candidates[0] if candidates else None


def _why_not(plugins: PluginManager, uri: ModelURI) -> str | None:
    """Why a server is not asked for ``uri``; empty if that needs no words, None if it is asked."""
    if uri.scheme in plugins.table(TRANSPORT).schemes:
        return ""
    if uri.scheme in plugins.table(STORAGE).schemes:
        try:
            provider = plugins.table(STORAGE).lookup(uri.scheme).provider
        except ModelExpressError:  # the load that tries the URI reports it
            return ""
        if provider.tier is Tier.CACHE:
            return ""
        if not provider.capabilities.global_versions:
            return f"{uri.scheme} means something else on another machine"
    if uri.userinfo or not uri.query.keys() <= _PARAMETERS:
        return "the URI has parameters, or a user, which a server is not told"
    return None


def _shared(
    url: str, uri: ModelURI, directory: str, environ: Mapping[str, str], request: LoadRequest
) -> Candidate | None:
    """The files on the common disk, once the server has all of them; None if they are not there.

    Raises:
        ModelExpressError: The server has no cache, or does not get the model.
    """
    from modelexpress_core.sources.cache_client import CacheClient

    with CacheClient.from_env(url, environ) as client:
        model = client.open(uri.path, revision=uri.query.get("revision", ""))
        if not model.complete:
            arrived = f"{format_bytes(model.present_bytes)} of {format_bytes(model.size_bytes)}"
            if request.on_skipped is not None:  # somebody asks what a load would do
                reason = f"{arrived} have arrived at the server; a load waits for all, and then reads {directory}"
                request.skip(f"{_NAME} on the common disk", reason)
                return None
            _log.info("waiting until the server has downloaded %s: %s so far", uri, arrived)
            model = client.follow(model)
        inside = uri.path[len(model.root_in(uri.path)) + 1 :]
    missing = "the server does not say where it is"
    if model.directory:
        root = os.path.realpath(directory)
        path = os.path.realpath(os.path.join(root, model.directory))
        # The server is trusted with the weights, and not with other files of this machine.
        inner = path.startswith(f"{root}{os.sep}")
        missing = _missing(path, model.sizes) if inner else "it is outside of that directory"
        if not missing:
            return Candidate(ModelURI("file", path=os.path.join(path, inside).rstrip("/")), SERVER_VARIABLES[0])
    _log.warning("%s is streamed, since it is not in MODEL_EXPRESS_CACHE_DIRECTORY (%s): %s", uri, directory, missing)
    request.skip(f"{_NAME} on the common disk", f"the model is not in {directory}: {missing}", "mount it at this path")
    return None


def _missing(path: str, sizes: Mapping[str, int]) -> str:
    """What of a model is not on disk; empty if all of it is."""
    for name, size in sizes.items():
        file = os.path.join(path, name)
        try:
            found = os.stat(file).st_size
        except OSError as exc:
            return f"{file}: {exc.strerror}"
        if found != size:
            return f"{file} has {found} bytes, not {size}"
    return ""
