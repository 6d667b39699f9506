"""The settings of the integration."""

from __future__ import annotations

from attrs import frozen

from modelexpress_core.settings import boolean, env
from modelexpress_core.uri import redacted

__all__ = ["VllmSettings"]


@frozen
class VllmSettings:
    """Where vLLM's weights come from."""

    model_uri: str | None = env(
        "MX_MODEL_URI",
        default=None,
        shown=redacted,
        help="Location of the weights: any URI or path. Unset: the files that vLLM finds for its --model.",
    )
    fallback: bool = env(
        "MX_FALLBACK",
        default=True,
        converter=boolean,
        help="If a load fails on any rank, let vLLM's own loader load the weights on every rank.",
    )
