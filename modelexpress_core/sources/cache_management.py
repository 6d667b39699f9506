"""Calls that manage the model cache of a server: what ``mx models`` asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from modelexpress_core.errors import BackendError, NotFoundError
from modelexpress_core.settings import from_env
from modelexpress_core.sources.settings import ServerAddress
from modelexpress_core.wire.client import Client, Security
from modelexpress_core.wire.proto.modelexpress import cache_pb2
from modelexpress_core.wire.rpc import CACHE

__all__ = ["CacheManagement"]

#: Files of one answer that are shown.
_MAX_DAMAGED = 100_000


class CacheManagement(Client):
    """A connection to the cache of one server. Thread-safe. The constructor sends nothing.

    Raises:
        BackendError: By each call: not found, access denied, unavailable, deadline, unsupported.
    """

    @classmethod
    def from_env(cls, url: str, environ: Mapping[str, str] | None = None) -> CacheManagement:
        """Connect to ``url`` as the environment variables say.

        Raises:
            SettingsError: Variables, or files that they name, cannot be used.
            InvalidURIError: The address is not valid.
        """
        seconds = from_env(ServerAddress, environ).deadline_seconds
        return cls(url, (CACHE,), deadline_seconds=seconds, security=Security.from_env(environ))

    def models(self) -> Sequence[cache_pb2.CachedModel]:
        """All versions, those first that were read last."""
        response: cache_pb2.ListModelsResponse = self._call(CACHE, "ListModels", cache_pb2.ListModelsRequest())
        return response.models

    def stats(self) -> cache_pb2.GetCacheStatsResponse:
        """What the cache holds, and did since the server began."""
        response: cache_pb2.GetCacheStatsResponse = self._call(CACHE, "GetCacheStats", cache_pb2.GetCacheStatsRequest())
        return response

    def ensure(
        self, place: str, revision: str, *, weights: bool, on_progress: Callable[[int, int], None]
    ) -> tuple[str, str]:
        """Have the server download a model, and wait until it is complete; returns its place and version.

        Args:
            place: The model.
            revision: A branch, tag or commit; empty for the default.
            weights: Whether files of weights are needed.
            on_progress: Called with the bytes that are there, and all bytes.

        Raises:
            BackendError: The download failed.
        """
        request = cache_pb2.OpenModelRequest(place=place, revision=revision, no_weights=not weights)
        with self._stream(CACHE, "OpenModel", request, deadline_seconds=math.inf) as answers:
            for answer in answers:
                on_progress(answer.present_bytes, answer.size_bytes)
                if answer.complete:
                    return answer.place, answer.version
        message = "the server ended the call before the model was complete"
        raise BackendError(message, uri=self.url, operation=f"download {place}", hint="run the command again")

    def validate(
        self, place: str, version: str, on_progress: Callable[[int, int], None]
    ) -> Sequence[cache_pb2.DamagedFile]:
        """Have the server compare all files of a version with their digests; returns the damaged ones."""
        model = cache_pb2.ModelVersion(place=place, version=version)
        request = cache_pb2.ValidateModelRequest(model=model)
        with self._stream(CACHE, "ValidateModel", request, deadline_seconds=math.inf) as answers:
            for answer in answers:
                on_progress(answer.compared_bytes, answer.size_bytes)
                if answer.done:
                    damaged: Sequence[cache_pb2.DamagedFile] = answer.damaged[:_MAX_DAMAGED]
                    return damaged
        message = "the server ended the call before all files were compared"
        raise BackendError(message, uri=self.url, operation=f"validate {place}", hint="run the command again")

    def remove(self, place: str, version: str) -> tuple[int, int]:
        """Remove a version; returns how many were removed, and the bytes that were freed."""
        model = cache_pb2.ModelVersion(place=place, version=version)
        request = cache_pb2.RemoveModelRequest(model=model)
        response: cache_pb2.RemoveModelResponse = self._call(CACHE, "RemoveModel", request)
        return response.removed, response.freed_bytes

    def versions(self, place: str, beginning: str) -> Sequence[cache_pb2.CachedModel]:
        """The versions of a model that begin with ``beginning``.

        Raises:
            NotFoundError: There is none.
        """
        of_model = [each for each in self.models() if each.place in {place, f"hf/{place}", place.removeprefix("hf/")}]
        chosen = [each for each in of_model if each.version.startswith(beginning)]
        if not chosen:
            known = ", ".join(each.version[:12] for each in of_model)
            raise NotFoundError(
                f"{place} is not in the cache" + (f" at {beginning}: its versions are {known}" if known else ""),
                uri=self.url,
                operation="look for the model",
                hint="list what is there with mx models list",
            )
        return chosen
