"""``static://``: the sources in ``MX_STATIC_SOURCES``, for fleets whose sources do not change."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from modelexpress_core.contracts.candidates import Candidate, LoadRequest
from modelexpress_core.errors import InvalidURIError, SettingsError
from modelexpress_core.settings import from_env
from modelexpress_core.sources.settings import StaticSources
from modelexpress_core.uri import ModelURI

__all__ = ["StaticDiscovery", "open_static"]


class StaticDiscovery:
    """Returns the same candidates for every request.

    Args:
        uris: Peers (``grpc://10.0.0.5:6555``) and checkpoints (``s3://bucket/model``).
    """

    def __init__(self, uris: Sequence[ModelURI]) -> None:
        self._candidates = tuple(Candidate(uri, origin="static") for uri in uris)

    def candidates(self, request: LoadRequest) -> Sequence[Candidate]:  # noqa: ARG002 - the protocol's signature
        """Return all sources. Whether one holds the model shows when a load opens it."""
        return self._candidates

    def close(self) -> None:
        """Do nothing: nothing is open."""


def open_static(uri: ModelURI, settings: Mapping[str, str]) -> StaticDiscovery:
    """Open the discovery for ``static://``.

    Raises:
        SettingsError: ``MX_STATIC_SOURCES`` contains an invalid URI, or text follows ``static://``.
    """
    if uri.authority or uri.path or uri.query:
        message = f"nothing may follow static:// in the URI of the discovery: {uri}"
        raise SettingsError(message, hint="write static://, and list the sources in MX_STATIC_SOURCES")
    uris, problems = [], []
    for text in from_env(StaticSources, settings).uris:
        try:
            uris.append(ModelURI.parse(text))
        except InvalidURIError as exc:
            problems.append(exc.message)
    if problems:
        message = "MX_STATIC_SOURCES contains an invalid URI: " + "; ".join(problems)
        raise SettingsError(message, hint="separate URIs by commas: grpc://10.0.0.5:6555,s3://bucket/model")
    return StaticDiscovery(uris)
