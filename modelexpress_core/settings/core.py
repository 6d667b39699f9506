"""The settings of core: which plugins are used, and how weights are fetched."""

from __future__ import annotations

from collections.abc import Mapping

import attrs
from attrs import frozen

from modelexpress_core.settings.converters import (
    boolean,
    buffer_bytes,
    names,
    pairs,
    positive_integer,
    seconds,
)
from modelexpress_core.settings.declaring import env

__all__ = ["CORE_SETTINGS", "LoadSettings", "PluginSettings"]


@frozen
class PluginSettings:
    """Which plugins are used."""

    allowed: tuple[str, ...] | None = env(
        "MX_PLUGINS",
        default=None,
        converter=names,
        help="Use only these plugins (distribution names, comma-separated); built-ins are always used.",
    )
    disabled: tuple[str, ...] = env(
        "MX_DISABLED_PLUGINS",
        default=(),
        converter=names,
        help="Never import these plugins (distribution names, comma-separated).",
    )
    prefer: Mapping[str, str] = env(
        "MX_PREFER",
        default=attrs.Factory(dict),
        converter=pairs,
        help="The plugin for a scheme that several claim: s3=mx-s3-fast,gs=...",
    )
    strict: bool = env(
        "MX_STRICT_PLUGINS",
        default=False,
        converter=boolean,
        help="Stop at the first broken plugin or conflict, instead of continuing without it.",
    )


@frozen
class LoadSettings:
    """How weights are fetched."""

    concurrency: int | None = env(
        "MX_CONCURRENCY",
        "RUNAI_STREAMER_CONCURRENCY",
        default=None,
        converter=positive_integer,
        help="Upper bound on concurrent reads; the number is tuned below it. Unset: the bound of the storage.",
    )
    chunk_bytes: int = env(
        "MX_CHUNK_BYTES",
        default=8 << 20,
        converter=buffer_bytes,
        help="Largest single read; larger tensors are split.",
    )
    staging_bytes: int = env(
        "MX_STAGING_BYTES",
        default=256 << 20,
        converter=buffer_bytes,
        help="Memory for bytes that cannot be read directly into place.",
    )
    retry_attempts: int = env(
        "MX_RETRY_ATTEMPTS",
        default=8,
        converter=positive_integer,
        help="Attempts of one read before the load fails; progress resets the count.",
    )
    retry_budget_seconds: float = env(
        "MX_RETRY_BUDGET_SECONDS",
        default=120.0,
        converter=seconds,
        help="Total time that all reads of one load may wait between attempts.",
    )
    stall_seconds: float = env(
        "MX_STALL_SECONDS",
        default=30.0,
        converter=seconds,
        help="Longest time that a read may go without a byte; shorter once the usual duration of reads is known.",
    )
    verify_digests: bool = env(
        "MX_VERIFY_DIGESTS",
        default=True,
        converter=boolean,
        help="Compare files that are read as a whole with the digests that the storage publishes.",
    )
    force_staging: bool = env(
        "MX_FORCE_STAGING",
        default=False,
        converter=boolean,
        help="Read everything through staging buffers, as for devices that need them; for tests.",
    )


#: Every settings class of core, in the order in which `mx settings` shows them.
CORE_SETTINGS: tuple[type, ...] = (LoadSettings, PluginSettings)
