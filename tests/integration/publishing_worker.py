"""A worker that publishes itself, in a process of its own: `python publishing_worker.py URL WORKER_ID MODE`.

It says "ready" once the server has it as ready, and then does what the mode says.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from types import FrameType, SimpleNamespace

import grpc._channel

URL, WORKER_ID, MODE = sys.argv[1:]

if MODE.startswith("clock "):  # before anything has read it
    # gRPC adds a time-out to Python's clock and compares the sum with the system's. A clock that is really wrong is so
    # in both, so it is left out here.
    grpc._channel.time = SimpleNamespace(**vars(time))  # type: ignore[attr-defined]
    OFFSET, real_time = float(MODE.partition(" ")[2]), time.time
    time.time = lambda: real_time() + OFFSET

from modelexpress_core.contracts.identity import SourceIdentity  # noqa: E402 - the clock is set first
from modelexpress_core.sources.client import ServerClient  # noqa: E402 - the clock is set first
from modelexpress_core.sources.publishing import Publisher, withdraw_on_exit  # noqa: E402 - as above
from modelexpress_core.wire.proto.modelexpress import p2p_pb2  # noqa: E402 - as above


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def handle(_number: int, _frame: FrameType | None) -> None:
    say("handled")
    sys.exit(7)


def main() -> None:
    if MODE == "handler":
        signal.signal(signal.SIGTERM, handle)
    elif MODE == "ignore":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    client = ServerClient(URL)
    publisher = Publisher(
        client, SourceIdentity("acme/model"), p2p_pb2.WorkerMetadata(), WORKER_ID, interval_seconds=0.5
    )
    publisher.start()
    publisher.ready()
    withdraw_on_exit(publisher)
    while publisher.state.status != "ready":
        time.sleep(0.01)
    say("ready")
    if MODE.startswith("fork"):
        fork()
    go_on(client, publisher)


def go_on(client: ServerClient, publisher: Publisher) -> None:
    """Until it ends, or is ended."""
    if MODE == "return":
        return
    if MODE == "raise":
        message = "the engine failed"
        raise RuntimeError(message)
    if MODE == "locked":
        logging.basicConfig(level=logging.DEBUG)
        logging.getLogger().handlers[0].acquire()
    while True:
        if MODE == "busy":  # in the middle of calls on the same connection, and of the publisher's own methods
            client.list_sources()
            publisher.ready()
            _ = publisher.state
        else:
            time.sleep(0.1)


def fork() -> None:
    child = os.fork()
    if child == 0:
        if MODE == "fork and SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        sys.exit(3)  # as a worker of a data loader would, with all that atexit does
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    say(f"child {status}")


main()
