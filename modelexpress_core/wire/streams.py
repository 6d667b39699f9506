"""Streams of a call as its caller sees them: responses with errors of ours, and requests from any iterable."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, Generic, TypeVar

import grpc

from modelexpress_core.errors import BackendError, UnavailableError

__all__ = ["RequestStream", "ResponseStream"]

_R = TypeVar("_R")


class RequestStream:
    """The requests of a call, which gRPC takes in a thread of its own.

    It keeps an exception that the caller's iterable raises: gRPC itself would report that as a failure of the call, and
    drop it.

    Args:
        requests: The messages, or frames of bytes.

    Attributes:
        error: What the iterable raised; None if nothing.
    """

    def __init__(self, requests: Iterable[Any]) -> None:
        self._requests = iter(requests)
        self.error: BaseException | None = None

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:  # noqa: ANN401 - any message
        try:
            return next(self._requests)
        except StopIteration:
            raise
        except BaseException as exc:
            self.error = exc
            raise


class ResponseStream(Generic[_R]):
    """The responses of a call, with errors of our own wherever they arise; thread-safe to close.

    The call begins before the first response is asked for. It is cancelled by ``close``, at the end of the ``with``
    block, and when the stream is garbage.

    Args:
        call: The call of gRPC.
        translate: Makes an error of ours from one of gRPC's, and from whether the caller closed the stream.
        requests: The requests of the call, if they are a stream.
    """

    def __init__(
        self,
        call: Any,  # noqa: ANN401 - annotations of gRPC have no name for it
        translate: Callable[[grpc.RpcError, bool], BackendError],
        requests: RequestStream | None = None,
    ) -> None:
        self._call = call
        self._translate = translate
        self._requests = requests
        self._closed = threading.Event()
        self._ended = False

    def __iter__(self) -> Iterator[_R]:
        return self

    def __next__(self) -> _R:
        """The next response.

        Raises:
            BackendError: The call failed; what came before is good, and there is no more. Also after ``close``, so that
                a stream that was closed is not taken for one that is complete.
            Exception: What the iterable of the requests raised.
        """
        if self._ended:
            raise StopIteration
        try:
            response: _R = next(self._call)
        except StopIteration:
            self._ended = True
            raise
        except grpc.RpcError as exc:
            if self._requests is not None and self._requests.error is not None:
                raise self._requests.error from None
            raise self._translate(exc, self._closed.is_set()) from exc
        except ValueError as exc:  # where calls are traced, gRPC raises it here if another thread closed the channel
            raise UnavailableError(
                "the connection was closed on this side",
                retryable=False,
                hint="keep the client, and the stream, open for as long as they are used",
            ) from exc
        return response

    def __enter__(self) -> ResponseStream[_R]:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Cancel the call, unless it has ended. A thread that waits for a response gets an error."""
        self._closed.set()
        self._call.cancel()
