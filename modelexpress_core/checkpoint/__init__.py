"""What is stored: the files of a checkpoint, their tensors, and the byte range of each."""

from __future__ import annotations

from modelexpress_core.checkpoint.checkpoint import Checkpoint, CheckpointFile, TensorInfo
from modelexpress_core.checkpoint.opening import open_files

__all__ = ["Checkpoint", "CheckpointFile", "TensorInfo", "open_files"]
