"""Test tools for plugin authors: contract classes to inherit, and a storage that fails on request.

The contracts need pytest and hypothesis; the contract of metadata stores also needs the server:
``pip install '.[server,testing]'`` in a checkout.
``FaultyStorage`` needs no extra. No module here imports torch, and each name is imported at first use.
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

_MODULES = {
    "Fault": "faults",
    "FaultPolicy": "faults",
    "FaultyStorage": "faults",
    "MetadataStoreContract": "metadata_store_contract",
    "PluginContract": "plugin_contract",
    "StorageContract": "storage_contract",
    "UNUSUAL_NAMES": "storage_contract",
}

__all__ = [
    "UNUSUAL_NAMES",
    "Fault",
    "FaultPolicy",
    "FaultyStorage",
    "MetadataStoreContract",
    "PluginContract",
    "StorageContract",
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
