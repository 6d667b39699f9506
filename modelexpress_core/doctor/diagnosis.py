"""Which diagnosis a URI gets."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

from modelexpress_core.doctor.examination import Examination
from modelexpress_core.doctor.step import Step
from modelexpress_core.doctor.storage import StorageExamination
from modelexpress_core.errors import ModelExpressError
from modelexpress_core.loads.context import plugins_for
from modelexpress_core.plugins import STORAGE, TRANSPORT, PluginManager
from modelexpress_core.uri import ModelURI

__all__ = ["diagnose"]


def diagnose(
    uri: str | os.PathLike[str] | ModelURI,
    *,
    environ: Mapping[str, str] | None = None,
    plugins: PluginManager | None = None,
    timeout_seconds: float = 5.0,
) -> Iterator[Step]:
    """Examine everything that a load of ``uri`` needs, and yield the result of each step as soon as it is known.

    Reads settings, looks names up, connects, lists, reads 64 KiB at the start and in the middle of a file, and all
    headers; of a worker, one chunk of a tensor. Writes nothing. It raises no error: failures are in the steps.
    ``can_load`` sums them up.

    Args:
        uri: A directory, an index, or one safetensors file, as a URI or a path; or a worker.
        environ: Variables to read settings from; by default the process's.
        plugins: Plugins to use; by default all that are installed and allowed.
        timeout_seconds: How long one wait on the network may take; a request to the storage may take four times as
            long, all headers twelve times.

    Yields:
        One ``Step`` for each name in ``STEPS``, or in ``PEER_STEPS`` for a worker.
    """
    with contextlib.suppress(ModelExpressError):  # the step of the plugin reports it
        plugins = plugins or plugins_for(environ)
    examination: Examination
    if plugins and _names_worker(uri, plugins):
        from modelexpress_core.doctor.peer import PeerExamination  # needs gRPC, which storages do without

        examination = PeerExamination(uri, environ, plugins, timeout_seconds)
    else:
        examination = StorageExamination(uri, environ, plugins, timeout_seconds)
    with contextlib.closing(examination):
        yield from examination.steps()


def _names_worker(uri: str | os.PathLike[str] | ModelURI, plugins: PluginManager) -> bool:
    """Whether a URI is that of a worker, by its scheme; what is wrong with it is left to the diagnosis."""
    try:
        scheme = ModelURI.parse(uri).scheme
        return scheme in plugins.table(TRANSPORT).schemes and scheme not in plugins.table(STORAGE).schemes
    except ModelExpressError:
        return False
