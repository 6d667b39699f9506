"""Collects candidates from all configured discoveries, and ranks them."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from modelexpress_core.contracts.candidates import Candidate, LoadRequest, Skipped, Tier
from modelexpress_core.errors import InvalidURIError, ModelExpressError, SettingsError
from modelexpress_core.messages import printable
from modelexpress_core.plugins import DISCOVERY, STORAGE, TRANSPORT, Kind, PluginManager
from modelexpress_core.providers import TransportProvider
from modelexpress_core.settings import from_env
from modelexpress_core.sources.metrics import source_metrics
from modelexpress_core.sources.server_cache import SERVER_VARIABLES, cache_candidates
from modelexpress_core.sources.settings import DiscoverySettings
from modelexpress_core.uri import ModelURI

__all__ = ["asks_server", "find_candidates", "finds_workers"]

_log = logging.getLogger(__name__)

#: A plugin's error may quote what a worker published.
_MAX_REASON_LENGTH = 200


def find_candidates(plugins: PluginManager, environ: Mapping[str, str], request: LoadRequest) -> tuple[Candidate, ...]:
    """Return the candidates for a load, best first: workers, the cache of the server, the requested URI.

    Without an identity no discovery is used. A discovery that fails is skipped with a warning; the requested URI always
    remains. A candidate that no installed plugin reads is skipped with a debug message. ``request.on_skipped`` gets the
    reason of each place that is left out.

    Args:
        plugins: Plugins that find, read and rank candidates.
        environ: Variables that configure discoveries and the selector (which replaces ``request.selector``).
        request: What to load. If its reader is empty, it becomes a name made of host, process and rank.

    Raises:
        SettingsError: A variable, or a URI in it, is not valid.
        PluginError: The ranking of a plugin failed.
    """
    own = _with_tier(plugins, environ, Candidate(request.uri), request) or Candidate(request.uri)
    cached = [
        attrs.evolve(readable, tier=Tier.CACHE)
        for candidate in cache_candidates(plugins, environ, request)
        if (readable := _with_tier(plugins, environ, candidate, request)) is not None
    ]
    if request.identity is None:
        return plugins.rank_candidates(request, (*cached, own))
    settings = from_env(DiscoverySettings, environ)
    reader = request.reader or f"{socket.gethostname()}/{os.getpid()}/{request.worker_rank}"
    assumed = (record.provider for record in plugins.records(TRANSPORT) if record.provider.assumed)
    request = attrs.evolve(
        request,
        reader=reader,
        selector=settings.selector,
        assumed_transports=tuple(scheme for provider in assumed for scheme in provider.schemes),
    )
    found = [
        readable
        for text in _discovery_uris(settings, environ, request)
        for candidate in _candidates_of(plugins, environ, request, text)
        if (readable := _with_tier(plugins, environ, candidate, request)) is not None
    ]
    candidates: dict[ModelURI, Candidate] = {}
    for candidate in (*found, *cached, own):
        candidates.setdefault(candidate.uri, candidate)
    peers = {candidate.peer.worker_id for candidate in candidates.values() if candidate.peer is not None}
    metrics = source_metrics()
    metrics.counted(request.selector, "usable", len(peers))
    with metrics.selecting(request.selector):
        ranked = plugins.rank_candidates(request, tuple(candidates.values()))
    if ranked and ranked[0].peer is not None:
        metrics.selected(request.selector)
    for uri in candidates.keys() - {candidate.uri for candidate in ranked}:
        request.skip(str(uri), "a plugin's mx_rank_candidates left it out", "disable the plugin: MX_DISABLED_PLUGINS")
    return ranked


def finds_workers(environ: Mapping[str, str]) -> bool:
    """Return whether the variables ``environ`` name a discovery, or a server that lists workers.

    Raises:
        SettingsError: One of them is not valid.
    """
    settings = from_env(DiscoverySettings, environ)
    named = any(environ.get(name, "").strip() for name in SERVER_VARIABLES)
    return bool(settings.uris) or settings.backend is not None or named


def asks_server(environ: Mapping[str, str]) -> bool:
    """Return whether a server is one of the discoveries that the variables ``environ`` name.

    Raises:
        SettingsError: One of them is not valid.
    """
    settings = from_env(DiscoverySettings, environ)
    uris = settings.uris or ((settings.backend,) if settings.backend is not None else ())
    if not uris:
        return any(environ.get(name, "").strip() for name in SERVER_VARIABLES)
    return any(uri.strip().lower().startswith("server:") for uri in uris)


def _discovery_uris(settings: DiscoverySettings, environ: Mapping[str, str], request: LoadRequest) -> Sequence[str]:
    """Return the URIs of the discoveries to use."""
    if settings.uris:
        return settings.uris
    if settings.backend is not None:
        return (settings.backend,)
    if any(environ.get(name, "").strip() for name in SERVER_VARIABLES):
        return ("server://",)
    request.skip("other workers", "no server is named that lists them", "set MODEL_EXPRESS_URL, or MX_DISCOVERY")
    return ()


def _candidates_of(
    plugins: PluginManager, environ: Mapping[str, str], request: LoadRequest, text: str
) -> Iterator[Candidate]:
    """Yield the candidates that the discovery at the URI ``text`` finds."""
    if "://" not in text:
        message = f"MX_DISCOVERY contains an invalid discovery URI: {text!r}"
        raise SettingsError(message, hint="write server://, static://, or the URI of a plugin's discovery")
    try:
        uri = ModelURI.parse(text)
    except InvalidURIError as exc:
        message = f"MX_DISCOVERY contains an invalid discovery URI: {exc.message}"
        raise SettingsError(message, hint=exc.hint) from exc
    try:
        _, discovery = plugins.open(DISCOVERY, uri, environ)
    except SettingsError:
        raise
    except ModelExpressError as exc:
        _log.warning("skipping the discovery %s, because it failed: %s", uri, exc)
        request.skip(str(uri), exc.headline, exc.hint or "")
        return
    try:
        candidates = tuple(discovery.candidates(request))
        yield from (candidate for candidate in candidates if _is_candidate(candidate, uri))
    except ModelExpressError as exc:
        _log.warning("skipping the discovery %s, because it failed: %s", uri, exc)
        request.skip(str(uri), exc.headline, exc.hint or "")
    except Exception as exc:  # noqa: BLE001 - a plugin's error must not prevent the load from the requested URI
        _log.warning(
            "skipping the discovery %s, because its plugin failed: %s: %s",
            uri,
            type(exc).__name__,
            exc,
            exc_info=exc,
        )
        request.skip(str(uri), f"its plugin failed: {type(exc).__name__}: {exc}", "report it to the plugin's authors")
    finally:
        try:
            discovery.close()
        except Exception as exc:  # noqa: BLE001 - as above
            _log.warning("closing the discovery %s failed: %s: %s", uri, type(exc).__name__, exc)


def _is_candidate(candidate: object, uri: ModelURI) -> bool:
    if isinstance(candidate, Candidate):
        return True
    _log.warning("skipping a candidate of %s, because it is no Candidate but a %s", uri, type(candidate).__name__)
    return False


def _with_tier(
    plugins: PluginManager, environ: Mapping[str, str], candidate: Candidate, request: LoadRequest
) -> Candidate | None:
    """Return ``candidate`` with the tier of the plugin that reads it; None if no installed plugin does."""
    scheme = candidate.uri.scheme
    kinds: tuple[Kind[Any, Any], ...] = (STORAGE, TRANSPORT) if candidate.peer is None else (TRANSPORT,)
    for kind in kinds:
        if scheme in plugins.table(kind).schemes:
            try:
                provider = plugins.table(kind).lookup(scheme).provider
            except ModelExpressError:  # for example a conflict: the load that tries the candidate reports it
                return candidate
            tier = provider.tier if kind is STORAGE else _peer_tier(provider, candidate, environ)
            return attrs.evolve(candidate, tier=tier)
    _log.debug("skipping %s, because no installed plugin handles %s", candidate.uri, scheme)
    if request.on_skipped is not None and candidate.uri != request.uri:
        try:
            plugins.table(kinds[-1]).lookup(scheme)
        except ModelExpressError as exc:
            request.on_skipped(Skipped(str(candidate.uri), (exc.headline,), exc.hint or "", candidate.peer))
    return None


def _peer_tier(provider: TransportProvider, candidate: Candidate, environ: Mapping[str, str]) -> Tier:
    """Return the tier of a worker. One with a record that its plugin cannot use comes last among the workers."""
    try:
        return provider.tier_of(candidate.peer, environ)
    except SettingsError:
        raise
    except Exception as exc:  # noqa: BLE001 - what one worker publishes must not end the loads of others
        _log.warning(
            "%s is tried after other workers, because %s cannot rank it: %s: %s",
            candidate.uri,
            provider.name,
            type(exc).__name__,
            printable(str(exc))[:_MAX_REASON_LENGTH],
        )
        return Tier.OTHER_PEER
