"""What is stored: the files of a checkpoint, the tensors in them, and where their bytes lie."""

from __future__ import annotations

from modelexpress_core.checkpoint.checkpoint import Checkpoint, CheckpointFile, TensorInfo
from modelexpress_core.checkpoint.opening import open_files

__all__ = ["Checkpoint", "CheckpointFile", "TensorInfo", "open_files"]
