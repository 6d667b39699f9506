"""``static://``: the places that ``MX_STATIC_SOURCES`` names, for fleets in which they do not change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelexpress_core.contracts.candidates import Candidate, LoadRequest
from modelexpress_core.errors import InvalidURIError, SettingsError
from modelexpress_core.settings import from_env
from modelexpress_core.sources.settings import StaticSources
from modelexpress_core.uri import ModelURI

__all__ = ["StaticDiscovery", "open_static"]


class StaticDiscovery:
    """Names the same places to everybody.

    Args:
        uris: Peers (``grpc://10.0.0.5:6555``) and checkpoints (``s3://bucket/model``).
    """

    def __init__(self, uris: Sequence[ModelURI]) -> None:
        self._candidates = tuple(Candidate(uri, origin="static") for uri in uris)

    def candidates(self, request: LoadRequest) -> Sequence[Candidate]:  # noqa: ARG002 - the protocol's signature
        """All of them: whether they hold what is asked for shows when they are read."""
        return self._candidates

    def close(self) -> None:
        """It holds nothing open."""


def open_static(uri: ModelURI, settings: Mapping[str, str]) -> StaticDiscovery:
    """The discovery for ``static://``.

    Raises:
        SettingsError: ``MX_STATIC_SOURCES`` holds something that is no URI, or there is something behind ``static://``.
    """
    if uri.authority or uri.path or uri.query:
        message = f"{uri} says more than static:// does"
        raise SettingsError(message, hint="write static://, and the places into MX_STATIC_SOURCES")
    uris, problems = [], []
    for text in from_env(StaticSources, settings).uris:
        try:
            uris.append(ModelURI.parse(text))
        except InvalidURIError as exc:
            problems.append(exc.message)
    if problems:
        message = "MX_STATIC_SOURCES holds what is no URI: " + "; ".join(problems)
        raise SettingsError(message, hint="separate URIs by commas: grpc://10.0.0.5:6555,s3://bucket/model")
    return StaticDiscovery(uris)
