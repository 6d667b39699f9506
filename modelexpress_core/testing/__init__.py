"""Test tools for plugin authors: contract classes to inherit, a storage that fails on request, and a worker.

The contracts need pytest and hypothesis; those of metadata stores and transports also need the server, and so does
``serving_worker``: ``pip install '.[server,testing]'`` in a checkout.
``FaultyStorage`` needs no extra. Each name is imported at first use; ``TransportContract`` alone imports torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from modelexpress_core.installing import install_command

if TYPE_CHECKING:
    from modelexpress_core.testing.faults import Fault, FaultPolicy, FaultyStorage
    from modelexpress_core.testing.metadata_store_contract import MetadataStoreContract
    from modelexpress_core.testing.plugin_contract import PluginContract
    from modelexpress_core.testing.storage_contract import UNUSUAL_NAMES, StorageContract
    from modelexpress_core.testing.transport_contract import TransportContract
    from modelexpress_core.testing.workers import ServingWorker, serving_worker

_MODULES = {
    "Fault": "faults",
    "FaultPolicy": "faults",
    "FaultyStorage": "faults",
    "MetadataStoreContract": "metadata_store_contract",
    "PluginContract": "plugin_contract",
    "ServingWorker": "workers",
    "StorageContract": "storage_contract",
    "TransportContract": "transport_contract",
    "UNUSUAL_NAMES": "storage_contract",
    "serving_worker": "workers",
}

__all__ = [
    "UNUSUAL_NAMES",
    "Fault",
    "FaultPolicy",
    "FaultyStorage",
    "MetadataStoreContract",
    "PluginContract",
    "ServingWorker",
    "StorageContract",
    "TransportContract",
    "serving_worker",
]


def __getattr__(name: str) -> object:
    if name not in __all__:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    try:
        if name == "MetadataStoreContract":  # so that its failures show the values that differ
            importlib.import_module("pytest").register_assert_rewrite(f"{__name__}.{_MODULES[name]}")
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    except ModuleNotFoundError as exc:
        if exc.name not in {"pytest", "hypothesis"}:
            raise
        message = f"{name} needs {exc.name}: {install_command('modelexpress-core[testing]')}"
        raise ModuleNotFoundError(message, name=exc.name) from exc
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
