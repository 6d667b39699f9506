"""Why a model does not load: a diagnosis in steps, from the settings to the headers.

::

    for step in diagnose("s3://bucket/model"):
        print(step.name, step.status, step.seen)
"""

from __future__ import annotations

from modelexpress_core.doctor.diagnosis import diagnose
from modelexpress_core.doctor.step import PEER_STEPS, STEPS, Step, can_load

__all__ = ["PEER_STEPS", "STEPS", "Step", "can_load", "diagnose"]
