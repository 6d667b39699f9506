"""Asks workers who reads from them. The workers know; the server does not, and heartbeats do not carry it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from attrs import frozen

from modelexpress_core.endpoint import Endpoint
from modelexpress_core.errors import ModelExpressError, UnsupportedError
from modelexpress_core.messages import printable
from modelexpress_core.settings import from_env
from modelexpress_core.sources.discovery.server import ENDPOINT_KEY
from modelexpress_core.sources.readers import Reader
from modelexpress_core.sources.settings import TrustSettings
from modelexpress_core.sources.trust import Claim, reason_to_distrust
from modelexpress_core.sources.worker_client import WorkerClient
from modelexpress_core.wire.proto.modelexpress import p2p_pb2

__all__ = ["ReaderList", "ask_readers"]

#: How many workers are asked at the same time, how long each may take and all of them, and how long an answer may be.
_THREADS = 16
_SECONDS = 3.0
_ALL_SECONDS = 20.0
_ANSWER_BYTES = 1 << 20


@frozen
class ReaderList:
    """The answer of one worker.

    Attributes:
        readers: Who reads now, then who has read for a while.
        left_out: How many more there are.
        problem: Why the worker did not answer; empty if it did.
    """

    readers: Sequence[Reader] = ()
    left_out: int = 0
    problem: str = ""


def ask_readers(
    listed: p2p_pb2.ListSourcesResponse,
    environ: Mapping[str, str],
    *,
    server: str,
    seconds: float = _ALL_SECONDS,
) -> Sequence[ReaderList]:
    """Return the answer of each listed worker, in the order of the list.

    Only workers that a reader would believe are asked, and a reader's token goes to none of them.

    Args:
        listed: The server's list.
        environ: Variables: certificates, tokens, trust.
        server: URL of the server, which grants reads.
        seconds: No worker is asked after this time.
    """
    trust = from_env(TrustSettings, environ)
    deadline = time.monotonic() + seconds

    def ask(source: p2p_pb2.SourceInstanceRef) -> ReaderList:
        if time.monotonic() > deadline:
            return ReaderList(problem=f"it is not asked: the others took {seconds:.0f} s")
        try:
            return _asked(source, listed.caller, trust, environ, server)
        except UnsupportedError:
            return ReaderList(problem="it is of another client, or an older version")
        except ModelExpressError as exc:
            return ReaderList(problem=exc.headline)

    with ThreadPoolExecutor(_THREADS, thread_name_prefix="mx-readers") as threads:
        return [*threads.map(ask, listed.instances)]


def _asked(
    source: p2p_pb2.SourceInstanceRef, caller: str, trust: TrustSettings, environ: Mapping[str, str], server: str
) -> ReaderList:
    published = source.topology.get(ENDPOINT_KEY)
    if not published:
        return ReaderList(problem="it published no address in the list")
    endpoint = Endpoint.parse(published)
    if reason := reason_to_distrust(Claim(endpoint, source.publisher, source.publisher_address), caller, trust):
        return ReaderList(problem=reason)
    client = WorkerClient.from_env(
        environ, url=str(endpoint), server=server, deadline_seconds=_SECONDS, most_answer_bytes=_ANSWER_BYTES
    )
    with client:
        answer = client.readers(source.mx_source_id, source.worker_id)
    readers = [
        Reader(
            name=printable(each.name),
            transport=printable(each.transport),
            read_bytes=each.read_bytes,
            counted=each.counted,
            seconds=each.seconds,
            ended_seconds=each.ended_seconds if each.HasField("ended_seconds") else None,
        )
        for each in answer.readers
    ]
    return ReaderList(readers, answer.left_out)
