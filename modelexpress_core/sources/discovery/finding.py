"""Asking every discovery that is set, and putting what they found in order."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from modelexpress_core.contracts.candidates import Candidate, LoadRequest
from modelexpress_core.errors import InvalidURIError, ModelExpressError, SettingsError
from modelexpress_core.plugins import DISCOVERY, STORAGE, TRANSPORT, Kind, PluginManager
from modelexpress_core.settings import from_env
from modelexpress_core.sources.metrics import source_metrics
from modelexpress_core.sources.settings import DiscoverySettings
from modelexpress_core.uri import ModelURI

__all__ = ["find_candidates"]

_log = logging.getLogger(__name__)

#: Whoever sets one of these means the server that it names to be asked.
_SERVER = ("MODEL_EXPRESS_URL", "MX_SERVER_ADDRESS")


def find_candidates(plugins: PluginManager, environ: Mapping[str, str], request: LoadRequest) -> tuple[Candidate, ...]:
    """The places to load from, best first: those that discoveries name, and the URI that was asked for.

    Without an identity nobody is asked. A discovery that fails is passed over with a warning: the URI that was asked
    for is always left. So is a place that no installed plugin reads, with a word in the debug log.

    Args:
        plugins: Who finds, who reads, and who ranks.
        environ: Variables that say which discoveries are asked, and how a peer is chosen (in place of
            ``request.selector``).
        request: What is to be loaded. A request without a reader is given one, of this host and process.

    Raises:
        SettingsError: A variable, or a URI in it, makes no sense.
        PluginError: The ranking of a plugin failed.
    """
    own = _with_tier(plugins, Candidate(request.uri)) or Candidate(request.uri)
    if request.identity is None:
        return plugins.rank_candidates(request, (own,))
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
        for text in _asked(settings, environ)
        for candidate in _ask(plugins, environ, request, text)
        if (readable := _with_tier(plugins, candidate)) is not None
    ]
    candidates: dict[ModelURI, Candidate] = {}
    for candidate in (*found, own):
        candidates.setdefault(candidate.uri, candidate)
    peers = {candidate.peer.worker_id for candidate in candidates.values() if candidate.peer is not None}
    metrics = source_metrics()
    metrics.counted(request.selector, "usable", len(peers))
    with metrics.selecting(request.selector):
        ranked = plugins.rank_candidates(request, tuple(candidates.values()))
    if ranked and ranked[0].peer is not None:
        metrics.selected(request.selector)
    return ranked


def _asked(settings: DiscoverySettings, environ: Mapping[str, str]) -> Sequence[str]:
    """URIs of the discoveries to ask."""
    if settings.uris:
        return settings.uris
    if settings.backend is not None:
        return (settings.backend,)
    return ("server://",) if any(environ.get(name, "").strip() for name in _SERVER) else ()


def _ask(plugins: PluginManager, environ: Mapping[str, str], request: LoadRequest, text: str) -> Iterator[Candidate]:
    """What the discovery at the URI ``text`` names."""
    if "://" not in text:
        message = f"MX_DISCOVERY holds what is no URI of a discovery: {text!r}"
        raise SettingsError(message, hint="write server://, static://, or the URI of a plugin's discovery")
    try:
        uri = ModelURI.parse(text)
    except InvalidURIError as exc:
        message = f"MX_DISCOVERY holds what is no URI of a discovery: {exc.message}"
        raise SettingsError(message, hint=exc.hint) from exc
    try:
        _, discovery = plugins.open(DISCOVERY, uri, environ)
    except SettingsError:
        raise
    except ModelExpressError as exc:
        _log.warning("going on without what %s knows, because it cannot be asked: %s", uri, exc)
        return
    try:
        candidates = tuple(discovery.candidates(request))
        yield from (candidate for candidate in candidates if _is_candidate(candidate, uri))
    except ModelExpressError as exc:
        _log.warning("going on without what %s knows, because it cannot be asked: %s", uri, exc)
    except Exception as exc:  # noqa: BLE001 - of a plugin, which must not keep a load from the place it was given
        _log.warning(
            "going on without what %s knows, because its plugin failed: %s: %s",
            uri,
            type(exc).__name__,
            exc,
            exc_info=exc,
        )
    finally:
        try:
            discovery.close()
        except Exception as exc:  # noqa: BLE001 - likewise
            _log.warning("%s does not close: %s: %s", uri, type(exc).__name__, exc)


def _is_candidate(candidate: object, uri: ModelURI) -> bool:
    if isinstance(candidate, Candidate):
        return True
    _log.warning("%s named a %s among its candidates, which is passed over", uri, type(candidate).__name__)
    return False


def _with_tier(plugins: PluginManager, candidate: Candidate) -> Candidate | None:
    """``candidate`` in the tier of the plugin that reads it; None if no installed plugin does."""
    scheme = candidate.uri.scheme
    kinds: tuple[Kind[Any, Any], ...] = (STORAGE, TRANSPORT) if candidate.peer is None else (TRANSPORT,)
    for kind in kinds:
        if scheme in plugins.table(kind).schemes:
            try:
                record = plugins.table(kind).lookup(scheme)
            except ModelExpressError:  # a conflict, say: the load that tries it reports it
                return candidate
            return attrs.evolve(candidate, tier=record.provider.tier)
    _log.debug("passing over %s, because no installed plugin handles %s", candidate.uri, scheme)
    return None
