"""What happens before vLLM starts an engine: settings are checked, and names of models get directories."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from modelexpress_core.errors import SettingsError
from mx_vllm import LOAD_FORMATS
from mx_vllm._checks import check_settings, warn_of_other_format
from mx_vllm._hub_models import HubName, directories_from_server, is_from_server
from mx_vllm._vllm import StartArguments

__all__ = ["keeps_name", "starting"]


@contextlib.contextmanager
def starting(arguments: StartArguments) -> Iterator[None]:
    """Prepare the start of an engine; it starts in the block.

    Raises:
        ModelExpressError: The settings cannot be used, or neither the server nor the Hub has the model.
    """
    if arguments.load_format not in LOAD_FORMATS:
        warn_of_other_format(arguments.load_format)
        for name in filter(keeps_name, arguments.hub_names()):
            arguments.require_downloaded(name)
        yield
        return
    check_settings()
    with directories_from_server(arguments):
        yield


def keeps_name(name: HubName) -> bool:
    """Return whether ``starting`` is going to find a directory for ``name``, so that vLLM need not."""
    try:
        return is_from_server(name, os.environ)
    except SettingsError:  # ``starting`` reports it if the load format is ours
        return False
