"""Settings of the integration."""

from __future__ import annotations

from attrs import frozen

from modelexpress_core.settings import boolean, env
from modelexpress_core.uri import redacted

__all__ = ["VllmSettings"]


@frozen
class VllmSettings:
    """The source of vLLM's weights."""

    model_uri: str | None = env(
        "MX_MODEL_URI",
        default=None,
        shown=redacted,
        help="The weights: any URI or path. Unset: the files that vLLM finds for its --model.",
    )
    fallback: bool = env(
        "MX_FALLBACK",
        default=True,
        converter=boolean,
        help="Whether vLLM's own loader loads the weights on every rank if ours fails on any.",
    )
