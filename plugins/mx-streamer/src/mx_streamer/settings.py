"""The settings that the plugin compares with those of the regular plugin; the engine reads many more itself."""

from __future__ import annotations

import os
from collections.abc import Mapping

from attrs import frozen

from modelexpress_core.contracts.storage import Endpoint
from modelexpress_core.errors import SettingsError
from modelexpress_core.settings import boolean, env

__all__ = ["StreamerSettings", "check_environment", "engine_endpoint"]

_OWN_PREFIX = "RUNAI_STREAMER_"
_ADDRESSING = "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING"


@frozen
class StreamerSettings:
    """How the engine reaches S3."""

    virtual_addressing: bool = env(
        _ADDRESSING,
        default=True,
        converter=boolean,
        help="Whether the engine puts the bucket into the host name of S3; if not, into the path.",
    )


def check_environment(settings: Mapping[str, str], *prefixes: str, environ: Mapping[str, str] = os.environ) -> None:
    """Return if ``settings`` agree with the environment of the process, which alone the engine reads.

    Variables with one of ``prefixes`` must be the same, or unset in both. Those of the engine itself may be left out.

    Raises:
        SettingsError: They differ. The message names the variables, and no value.
    """
    names = {name for name in settings if name.startswith((_OWN_PREFIX, *prefixes))}
    names |= {name for name in environ if name.startswith(prefixes)}
    differ = sorted(name for name in names if settings.get(name) != environ.get(name))
    if differ:
        message = (
            f"the engine of mx-streamer reads {', '.join(differ)} from the environment of the process, which differs "
            "from the settings of this load"
        )
        raise SettingsError(
            message, hint="set the variables in the environment of the process, or take mx-streamer out of MX_PREFER"
        )


def engine_endpoint(endpoint: Endpoint, bucket: str, settings: StreamerSettings) -> str:
    """The URL of the server for the engine, from the one that requests of the regular plugin go to.

    Raises:
        SettingsError: The engine would put the bucket elsewhere in the URL, and so reach another server.
    """
    in_host = endpoint.host.startswith(f"{bucket}.")
    if in_host != settings.virtual_addressing:
        where, value = ("host name", 1) if in_host else ("path", 0)
        message = f"requests to {endpoint.host} have the bucket in the {where}, and {_ADDRESSING} says otherwise"
        raise SettingsError(message, hint=f"set {_ADDRESSING}={value} in the environment of the process")
    host = endpoint.host.removeprefix(f"{bucket}.") if in_host else endpoint.host
    host = f"[{host}]" if ":" in host else host
    return f"{'https' if endpoint.tls else 'http'}://{host}:{endpoint.port}"
