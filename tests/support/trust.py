"""Which authorities libraries trust that read the list of this machine, and take no other one."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from devtools.missing import ToolMissingError

__all__ = ["machine_trusts"]

_BUNDLE = Path("/etc/ssl/certs/ca-certificates.crt")

#: From sched.h and sys/mount.h of Linux.
_CLONE_NEWNS = 0x00020000
_MS_BIND = 0x1000
_MS_REC_PRIVATE = 0x4000 | (1 << 18)
_MNT_DETACH = 2


@contextmanager
def machine_trusts(authority: Path) -> Iterator[None]:
    """Put ``authority`` in the place of the machine's list, for this thread and for those that it starts.

    They get a mount namespace of their own: nothing else sees the change. They keep it, with the machine's list again.

    Raises:
        ToolMissingError: This process may not mount, or the machine has its list elsewhere.
    """
    if not _BUNDLE.is_file():
        message = f"{_BUNDLE}: apt-get install ca-certificates"
        raise ToolMissingError(message)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS):
        message = "the right to mount: run the tests as root"
        raise ToolMissingError(message)
    _check(libc.mount(None, b"/", None, ctypes.c_ulong(_MS_REC_PRIVATE), None))
    _check(libc.mount(bytes(authority), bytes(_BUNDLE), None, ctypes.c_ulong(_MS_BIND), None))
    try:
        yield
    finally:
        _check(libc.umount2(bytes(_BUNDLE), _MNT_DETACH))


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
