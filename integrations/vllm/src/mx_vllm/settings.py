"""The settings of the integration."""

from __future__ import annotations

from attrs import frozen

from modelexpress_core.settings import boolean, env, seconds
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
    fallback: bool | None = env(
        "MX_FALLBACK",
        default=None,
        converter=boolean,
        help="After a failed load, let vLLM's own loader load the files of its --model on every rank (1), or fail (0). "
        "Unset: fail if MX_MODEL_URI is set.",
    )

    query_timeout_seconds: float = env(
        "MX_SOURCE_QUERY_TIMEOUT",
        default=3600.0,
        converter=seconds,
        help="How long --load-format mx-target waits for a worker that it can read.",
    )

    @property
    def may_fall_back(self) -> bool:
        """Whether vLLM's own loader may load the files of its model after a load has failed."""
        return self.model_uri is None if self.fallback is None else self.fallback
