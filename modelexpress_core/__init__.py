"""ModelExpress loads model weights from storages and peers straight into place.

This package has the public API. Names are imported at first use: importing the package imports no torch and no SDK.
"""

from __future__ import annotations

import importlib
import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from modelexpress_core.api import (
        DeferredWeights,
        deferred_weights,
        load_into,
        load_state_dict,
        open_checkpoint,
        publish,
    )
    from modelexpress_core.checkpoint import Checkpoint, CheckpointFile, TensorInfo
    from modelexpress_core.contracts.identity import SourceIdentity
    from modelexpress_core.copying import pull
    from modelexpress_core.errors import (
        AccessDeniedError,
        BackendError,
        CheckpointError,
        DeadlineError,
        IncompleteLoadError,
        IntegrityError,
        InvalidURIError,
        ModelExpressError,
        NotFoundError,
        PlacementError,
        PluginApiError,
        PluginConflictError,
        PluginError,
        PluginLoadError,
        ResolveError,
        ResourceError,
        SettingsError,
        SourceChangedError,
        StillArrivingError,
        ThrottledError,
        UnavailableError,
        UnknownSchemeError,
        UnsupportedError,
    )
    from modelexpress_core.explaining import Explanation, explain
    from modelexpress_core.hooks import hookimpl
    from modelexpress_core.plugins import PluginManager
    from modelexpress_core.report import LoadReport, PullReport
    from modelexpress_core.sources.identity import own_identity
    from modelexpress_core.uri import ModelURI

_MODULES = {
    "Checkpoint": "checkpoint",
    "CheckpointFile": "checkpoint",
    "DeferredWeights": "api",
    "Explanation": "explaining",
    "LoadReport": "report",
    "ModelURI": "uri",
    "PluginManager": "plugins",
    "PullReport": "report",
    "SourceIdentity": "contracts.identity",
    "TensorInfo": "checkpoint",
    "deferred_weights": "api",
    "explain": "explaining",
    "hookimpl": "hooks",
    "load_into": "api",
    "load_state_dict": "api",
    "open_checkpoint": "api",
    "own_identity": "sources.identity",
    "publish": "api",
    "pull": "copying",
}

__all__ = [
    "AccessDeniedError",
    "BackendError",
    "Checkpoint",
    "CheckpointError",
    "CheckpointFile",
    "DeadlineError",
    "DeferredWeights",
    "Explanation",
    "IncompleteLoadError",
    "IntegrityError",
    "InvalidURIError",
    "LoadReport",
    "ModelExpressError",
    "ModelURI",
    "NotFoundError",
    "PlacementError",
    "PluginApiError",
    "PluginConflictError",
    "PluginError",
    "PluginLoadError",
    "PluginManager",
    "PullReport",
    "ResolveError",
    "ResourceError",
    "SettingsError",
    "SourceChangedError",
    "SourceIdentity",
    "StillArrivingError",
    "TensorInfo",
    "ThrottledError",
    "UnavailableError",
    "UnknownSchemeError",
    "UnsupportedError",
    "deferred_weights",
    "explain",
    "hookimpl",
    "load_into",
    "load_state_dict",
    "open_checkpoint",
    "own_identity",
    "publish",
    "pull",
]

# This package needs no numpy, so a minimal installation has none, and torch would warn of it. Another failure of numpy,
# such as a version that torch was not built for, is still shown.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy: No module named", category=UserWarning)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("modelexpress-core")
    if name not in __all__:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    value = getattr(importlib.import_module(f"{__name__}.{_MODULES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
