"""Variables with our prefix that nothing reads: most are misspelt."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Mapping

__all__ = ["RESERVED_VARIABLES", "warn_unknown_variables"]

_log = logging.getLogger(__name__)

#: Variables with our prefix that other parts of ModelExpress read.
RESERVED_VARIABLES = frozenset(
    {
        "MX_FALLBACK",
        "MX_GC_TIMEOUT_SECS",
        "MX_HEARTBEAT_TIMEOUT_SECS",
        "MX_K8S_SERVICE_PATTERN",
        "MX_METADATA_PORT",
        "MX_MODEL_REVISION",
        "MX_MODEL_URI",
        "MX_NIXL_BACKEND",
        "MX_REAPER_SCAN_INTERVAL_SECS",
        "MX_SERVER_ADDRESS",
        "MX_TRANSFER_TIMEOUT",
    }
)


def warn_unknown_variables(environ: Mapping[str, str], known: Iterable[str]) -> tuple[str, ...]:
    """Log a warning for each ``MX_*`` variable that nothing reads, with the nearest known name.

    Returns:
        The unknown variables.
    """
    known = {*known, *RESERVED_VARIABLES}
    unknown = sorted(name for name in environ if name.startswith("MX_") and name not in known)
    for name in unknown:
        nearest = difflib.get_close_matches(name, known, n=1)
        guess = f"; did you mean {nearest[0]}?" if nearest else ""
        _log.warning("nothing reads the variable %s%s", name, guess)
    return tuple(unknown)
