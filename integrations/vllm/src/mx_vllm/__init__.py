"""ModelExpress for vLLM: the load formats ``mx``, ``modelexpress``, ``mx-source`` and ``mx-target``.

vLLM calls ``register`` in each of its processes. Importing this module does not import torch.
"""

from __future__ import annotations

import logging

__all__ = ["LOAD_FORMATS", "register"]

_log = logging.getLogger(__name__)

#: The second name is a built-in format of vLLM that imports another package; ``register`` replaces it.
LOAD_FORMATS = ("mx", "modelexpress", "mx-source", "mx-target")


def register() -> None:
    """Register the load formats with vLLM; may be called repeatedly. Never raises: vLLM then runs without them."""
    try:
        from mx_vllm._vllm import call_before_engine_starts, check_version, register_load_format

        check_version()
        from mx_vllm._loader import MxModelLoader
        from mx_vllm._start import keeps_name, starting

        call_before_engine_starts(starting, keeps_name)
        for load_format in LOAD_FORMATS:
            register_load_format(load_format, MxModelLoader)
    except Exception:  # noqa: BLE001 - see above
        _log.exception("ModelExpress could not register its load formats; vLLM runs without --load-format mx")
