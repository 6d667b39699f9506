"""Where ModelExpress keeps configuration and tokenizer of models for vLLM."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from modelexpress_core import ModelExpressError

__all__ = ["cache_directory", "locked", "make_private"]

#: Others may write to a directory with one of these bits.
_WRITABLE_BY_OTHERS = 0o022


def cache_directory() -> Path:
    """Return the directory below which models have their directories."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "modelexpress"


def make_private(directory: Path) -> None:
    """Make ``directory``, to which this user alone may write.

    Raises:
        ModelExpressError: It cannot be made, or others may write to it.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
    except OSError as exc:
        message = f"cannot make the directory {directory}: {exc.strerror}"
        raise ModelExpressError(message, hint="set XDG_CACHE_HOME to a directory that this user may write to") from exc
    if found.st_uid != os.geteuid() or found.st_mode & _WRITABLE_BY_OTHERS:
        mode = f"{found.st_mode & 0o777:o}"
        message = f"others may write to {directory}: it belongs to user {found.st_uid} and has the mode {mode}"
        hint = f"remove it or run chmod 700 {directory}; or set XDG_CACHE_HOME to another directory"
        raise ModelExpressError(message, cause="vLLM would run with what they write there", hint=hint)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a lock, so that several commands on one host wait for each other instead of failing."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory.parent / f".{directory.name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as exc:
        message = f"cannot write to {directory.parent}: {exc.strerror}"
        hint = "set XDG_CACHE_HOME, or the option --directory of `mx vllm`, to a directory that this user may write to"
        raise ModelExpressError(message, hint=hint) from exc
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
