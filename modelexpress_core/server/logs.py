"""The server's log: text or JSON, with only warnings and errors of other packages."""

from __future__ import annotations

import logging
import sys
import time
from datetime import datetime, timezone
from typing import Any

from modelexpress_core.messages import hide_credentials_of_urls, printable_lines
from modelexpress_core.server.settings import LogSettings

__all__ = ["announce", "write_log"]

#: Parent of the loggers of this program.
_OURS = "modelexpress_core"


class _Announcement(logging.LogRecord):
    """A record that is logged at every level, and as its message alone in text."""


class _ForPeople(logging.Formatter):
    converter = staticmethod(time.gmtime)

    def __init__(self) -> None:
        super().__init__("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")

    def format(self, record: logging.LogRecord) -> str:
        """Announcements are their message alone; other records have time, level and logger before it."""
        text = record.getMessage() if isinstance(record, _Announcement) else super().format(record)
        return printable_lines(hide_credentials_of_urls(text))


def _for_programs() -> logging.Formatter:
    """An object on each line: time, level, logger, message, the fields of the record, and an exception if there is one.

    Raises:
        ModuleNotFoundError: python-json-logger is not installed.
    """
    from pythonjsonlogger.json import JsonFormatter

    class ForPrograms(JsonFormatter):
        def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
            """Put the four fields of every line first; no field of a record replaces them."""
            time_ = datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="microseconds")
            always = {
                "time": time_.replace("+00:00", "Z"),
                "level": record.levelname.lower(),
                "logger": record.name,
                "message": record.getMessage(),
            }
            log_data.update(always)
            super().add_fields(log_data, record, message_dict)
            log_data.update(always)

    return ForPrograms("%(message)s", rename_fields={"exc_info": "exception", "stack_info": "stack"})


def write_log(settings: LogSettings) -> None:
    """Write the log to stderr as ``settings`` say, warnings of Python included.

    Other packages log warnings and errors alone: details that SDKs log contain credentials.

    Raises:
        ModuleNotFoundError: The format is ``json``, and python-json-logger is not installed.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_for_programs() if settings.format == "json" else _ForPeople())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(_OURS).setLevel(settings.level.upper())
    logging.captureWarnings(capture=True)


def announce(message: str, **fields: object) -> None:
    """Log where the server listens, or that it ends, at every level: programs wait for these lines.

    Args:
        message: The text, for people.
        **fields: Fields of the record, for programs.
    """
    logger = logging.getLogger(__name__)
    record = _Announcement(logger.name, logging.INFO, __file__, 0, message, (), None)
    vars(record).update(fields)
    logger.handle(record)
