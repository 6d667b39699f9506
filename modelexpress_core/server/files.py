"""Watches how many file descriptors the server has open: without free ones it accepts no connection."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import resource

__all__ = ["OpenFiles", "raise_limit"]

_log = logging.getLogger(__name__)

_WATCH_SECONDS = 2.0

#: Share of the limit from which on a warning is due, and below which the server has recovered.
_WARN_SHARE = 0.9
_RECOVERED_SHARE = 0.8

#: Connections of 10,000 workers, several each. It also bounds the memory of connections.
_WANTED = 65_536

#: Its entries are the open files of this process.
_DIRECTORY = "/proc/self/fd"


class OpenFiles:
    """Logs when the process nears its limit of open files, and when it has recovered."""

    def __init__(self) -> None:
        self._warned = False

    async def watch(self) -> None:
        """Look at intervals until cancelled. gRPC itself only waits, and says nothing."""
        while self.look():  # noqa: ASYNC110 - nothing reports a change of the number
            await asyncio.sleep(_WATCH_SECONDS)

    def look(self) -> bool:
        """Compare the number of open files with the limit; whether this system tells the number."""
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        try:
            count = len(os.listdir(_DIRECTORY))
        except OSError as exc:
            if exc.errno not in {errno.EMFILE, errno.ENFILE}:
                return False
            count = limit
        if count >= _WARN_SHARE * limit and not self._warned:
            self._warned = True
            _log.error(
                "%d of %d file descriptors are in use: without free ones the server accepts no connection; "
                "close clients, or raise the limit (ulimit -n)",
                count,
                limit,
            )
        elif count < _RECOVERED_SHARE * limit and self._warned:
            self._warned = False
            _log.info("%d of %d file descriptors are in use: the server accepts connections again", count, limit)
        return True


def raise_limit() -> None:
    """Raise this process's limit of open files, as far as the system allows: each connection takes one.

    Many systems allow 1024 by default, which are too few for 10,000 workers.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _WANTED if hard == resource.RLIM_INFINITY else min(_WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
