"""A plugin that makes loads fail, and kills or stops the worker that is read; tests install it by PYTHONPATH."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Mapping
from typing import Any

from modelexpress_core.errors import AccessDeniedError
from modelexpress_core.events import LoadFinished, LoadStarted
from modelexpress_core.hooks import hookimpl
from modelexpress_core.loads.destination import Destination
from modelexpress_core.providers import StorageProvider
from modelexpress_core.storage.file import open_file
from modelexpress_core.uri import ModelURI


class _RefusingSecondRank:
    """Files that the second rank may list, but of which it may read only the headers.

    If TEST_REFUSE names a file, it refuses only while there is such a file.
    """

    def __init__(self, uri: ModelURI, settings: Mapping[str, str]) -> None:
        self._files: Any = open_file(ModelURI("file", path=uri.path), settings)
        self.list = self._files.list
        self.stat = self._files.stat
        self.close = self._files.close

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        import torch

        refuses = os.path.exists(os.environ.get("TEST_REFUSE", "/"))
        if refuses and offset and torch.distributed.get_rank() == 1:
            message = "the second rank may not read"
            raise AccessDeniedError(message, uri=f"refusing://{path}", operation="read", provider="faulty-plugin")
        return int(self._files.read_into(path, offset, buffer, version=version))


@hookimpl
def mx_register_storages() -> list[StorageProvider]:
    return [StorageProvider("faulty-plugin", ("refusing",), _RefusingSecondRank)]


@hookimpl
def mx_load_started(event: LoadStarted) -> None:
    """Replace a file, local or in S3, after the headers were read; or kill the server that a load reads."""
    if event.uri.startswith("mx://") and os.environ.get("TEST_KILL_SERVER"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(os.environ["TEST_KILL_SERVER"]), signal.SIGKILL)
    replacement, replaced = os.environ.get("TEST_REPLACEMENT", ""), os.environ.get("TEST_REPLACED", "")
    if not replacement:
        return
    if not replaced.startswith("s3://"):
        shutil.copyfile(replacement, replaced)
        return
    import boto3

    bucket, _, key = replaced.removeprefix("s3://").partition("/")
    client = boto3.client("s3", region_name="us-east-1", endpoint_url=os.environ["AWS_ENDPOINT_URL"])
    client.upload_file(replacement, bucket, key)


def _signal_worker_that_is_read() -> None:
    """Send TEST_SIGNAL to the process group TEST_SIGNALLED when a load from it begins to write, before bytes arrive."""
    if not os.environ.get("TEST_SIGNALLED"):
        return
    touch = Destination.touch

    def touch_and_signal(self: Destination) -> None:
        touch(self)
        if not signalled:
            signalled.append(time.monotonic())
            with contextlib.suppress(ProcessLookupError):
                os.killpg(int(os.environ["TEST_SIGNALLED"]), signal.Signals[os.environ["TEST_SIGNAL"]])

    Destination.touch = touch_and_signal  # type: ignore[method-assign]


signalled: list[float] = []
_signal_worker_that_is_read()


@hookimpl
def mx_load_finished(event: LoadFinished) -> None:
    """Say how long a load took from the signal on."""
    if signalled:
        sys.stderr.write(f"\nSECONDS AFTER THE SIGNAL {time.monotonic() - signalled[0]}\n")
        sys.stderr.flush()
