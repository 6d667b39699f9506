"""Whether the settings can be used. vLLM's first process checks them before it starts an engine."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Mapping

from modelexpress_core import ModelExpressError, ModelURI, PluginManager
from modelexpress_core.errors import SettingsError
from modelexpress_core.plugins import STORAGE
from modelexpress_core.settings import CORE_SETTINGS, SettingSources, find_problems, from_env
from mx_vllm.settings import VllmSettings

__all__ = ["check_settings", "warn_of_other_format"]

_log = logging.getLogger(__name__)


def check_settings(environ: Mapping[str, str] | None = None) -> None:
    """Raise if a load must fail because of its settings: their values, the address, or the plugin for its scheme.

    Connects to no storage. With MX_FALLBACK=1 an address that cannot be used is accepted, but a wrong value is not.

    Args:
        environ: Variables to read settings from; by default the process's.

    Raises:
        SettingsError: Variables have values that cannot be used; the message names all of them.
        ResolveError: MX_MODEL_URI is not a URI, or no plugin handles its scheme.
        PluginError: The plugin for its scheme cannot be used.
        BackendError: The plugin cannot use its configuration.
    """
    environ = os.environ if environ is None else environ
    _check_values([*CORE_SETTINGS, VllmSettings], environ)
    settings = from_env(VllmSettings, environ)
    plugins = PluginManager.discover(environ)
    if settings.model_uri is None:
        return
    try:
        uri = plugins.rewrite_uri(ModelURI.parse(settings.model_uri), environ)
        _, storage = plugins.open(STORAGE, uri, environ)
    except SettingsError:
        raise
    except ModelExpressError:
        if not settings.may_fall_back:
            raise
    else:
        with contextlib.closing(storage):
            pass


def warn_of_other_format(load_format: str, environ: Mapping[str, str] | None = None) -> None:
    """Warn if MX_MODEL_URI is set although vLLM uses a load format that does not read it.

    Args:
        load_format: vLLM's load format, which is not one of ours.
        environ: As for ``check_settings``.
    """
    environ = os.environ if environ is None else environ
    if environ.get("MX_MODEL_URI"):
        _log.warning(
            "MX_MODEL_URI is set, but the load format %r does not read it: the weights come from vLLM's model. To load "
            "them from MX_MODEL_URI, add --load-format mx; else unset it",
            load_format,
        )


def _check_values(classes: Iterable[type], environ: Mapping[str, str]) -> None:
    problems = [problem for cls in classes for problem in find_problems(cls, SettingSources(environ))]
    if problems:
        message = "settings that cannot be used:\n  " + "\n  ".join(problems)
        raise SettingsError(message, hint="correct or unset them; `mx settings` shows all that are read")
