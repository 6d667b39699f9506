"""vLLM's model loader for the formats ``mx``, ``modelexpress``, ``mx-source`` and ``mx-target``."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

from attrs import frozen
from torch import nn
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

import modelexpress_core as mx
from modelexpress_core.errors import IncompleteLoadError, ModelExpressError, PlacementError, SourceChangedError
from modelexpress_core.loader import Loader
from modelexpress_core.loads.destination import Destination, DestinationTouchedError
from modelexpress_core.messages import listed
from modelexpress_core.settings import from_env
from modelexpress_core.sources.discovery.finding import finds_workers
from modelexpress_core.sources.settings import FollowSettings
from mx_vllm._hub_models import is_cache_used, streamed_uri, why_in_cache, why_not_in_cache, without_cache
from mx_vllm._identity import Worker, number_of, tensors_of
from mx_vllm._names import content_of_snapshot, name_of
from mx_vllm._peers import PeerResult, load_from_peers
from mx_vllm._publishing import Publication, watch_changes
from mx_vllm._reload import (
    PendingWeights,
    allow_to_run,
    check_shared,
    fully_written,
    in_layer_order,
    intercept_load_weights,
    refuse_to_run,
    shared_names,
)
from mx_vllm._vllm import (
    Source,
    any_rank,
    discard_reload,
    finish_reload,
    forgotten_layers,
    has_own_files,
    is_draft,
    is_first_rank,
    layers_with_packed_copies,
    must_be_loaded,
    must_be_reloaded,
    own_loader,
    own_weights,
    processed_weights,
    safetensors_of,
    same_on_all_ranks,
    share_log_handlers,
    share_log_level,
    sources_of,
    why_weights_do_not_travel,
)
from mx_vllm._watch import LoadWatch, headline_of
from mx_vllm.settings import VllmSettings

if TYPE_CHECKING:
    import torch
    from vllm.config import ModelConfig, VllmConfig
    from vllm.config.load import LoadConfig

    from modelexpress_core.sources.following import Turn

__all__ = ["MxModelLoader"]

# A child of vLLM's logger, so that vLLM's log settings apply.
_log = logging.getLogger("vllm.modelexpress")

#: How long a rank looks for a worker of its own rank once the first rank has found one.
_RANKS_SECONDS = 60.0


class MxModelLoader(BaseModelLoader):
    """Reads weights through ModelExpress: from another worker, MX_MODEL_URI, the server, or the files that vLLM finds.

    From a checkpoint, the model gets the weights as deferred tensors. Only the parts that it copies are read, straight
    into its parameters, so that each rank reads only its own bytes. From another worker, its parameters and buffers
    get the bytes that the same rank has there. Either all ranks read from workers, or none does.
    """

    #: vLLM's name of each model that was loaded. vLLM makes a new loader for each reload, and may change the name.
    _names: ClassVar[WeakKeyDictionary[nn.Module, str]] = WeakKeyDictionary()

    def __init__(self, load_config: LoadConfig) -> None:
        super().__init__(load_config)
        if load_config.model_loader_extra_config:
            message = (
                f"--load-format mx takes no model_loader_extra_config, got {load_config.model_loader_extra_config}"
            )
            raise ValueError(message)
        self._settings = from_env(VllmSettings, os.environ)
        self._own = own_loader(load_config)
        load_format = str(load_config.load_format).lower()
        self._reads_workers = load_format != "mx-source" and finds_workers(os.environ)
        self._reads_storage = load_format != "mx-target"
        self._vllm_config: VllmConfig | None = None
        self._worker: Worker | None = None
        self._content_version = ""
        self._why_no_worker = ""
        self._processed = contextlib.ExitStack()
        self._waiting = contextlib.ExitStack()
        self._turn: Turn | None = None
        self._is_draft_model = self._has_own_files = False
        self._may_fall_back = False
        self._destination = Destination()
        self._uses_cache = True
        self._read_from_cache = False
        self._why_no_cache = ""
        self._reason = ""
        self._explicit_path: str | None = None

    def download_model(self, model_config: ModelConfig) -> None:
        """Download the files, unless they come from MX_MODEL_URI or the server, or only workers are read."""
        if self._settings.model_uri is None and self._reads_storage and streamed_uri(model_config.model) is None:
            self._own.download_model(model_config)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Return the model with its weights. If ModelExpress fails on any rank, vLLM's own loader may load all ranks.

        MX_FALLBACK says whether it may; by default it may not if MX_MODEL_URI is set, since its weights may be others.

        Raises:
            ModelExpressError: The weights cannot be read, and there is no fallback.
        """
        self._is_draft_model = is_draft(vllm_config, model_config)
        self._has_own_files = self._is_draft_model and has_own_files(vllm_config, model_config)
        self._may_fall_back = self._reads_storage and self._is_fallback_allowed(model_config)
        self._vllm_config = vllm_config

        def build() -> nn.Module:
            with contextlib.ExitStack() as self._processed:
                built: nn.Module = super(MxModelLoader, self).load_model(
                    vllm_config=vllm_config, model_config=model_config, prefix=prefix
                )
            self._names[built] = model_config.model
            self._publish(built)
            return built

        with contextlib.ExitStack() as self._waiting, forgotten_layers(vllm_config) as forget:
            try:
                while True:  # once without workers, once without the cache of the server
                    try:
                        return build()
                    except _SourceFailedError as exc:
                        failure = str(exc)
                    # The half-written model was freed with the traceback that referred to it.
                    forget()
                    _log.warning("ModelExpress loads the weights into a new model, because %s", failure)
            except DestinationTouchedError:
                pass
            finally:
                self._may_fall_back = False
            forget()
            self._leave_queue()
        with self._both_reasons(model_config):
            own: nn.Module = self._own.load_model(vllm_config=vllm_config, model_config=model_config, prefix=prefix)
        self._names[own] = model_config.model
        return own

    def _publish(self, model: nn.Module) -> None:
        """Offer the model to other workers, from when the engine is ready."""
        if self._worker is None:
            return
        watch_changes()
        Publication(model, self._worker, self._content_version)

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Load the weights into an existing model.

        Raises:
            ModelExpressError: The weights cannot be read, or leave a parameter unwritten.
        """
        if self._vllm_config is not None and not self._is_draft_model and finds_workers(os.environ):
            self._describe(model, model_config, self._vllm_config)
            if self._reads_workers and self._load_from_workers(model, model_config):
                return
        if not self._reads_storage and not self._is_draft_model:
            raise self._no_worker_error()
        has_other_source = self._has_source_besides_cache()
        if not self._may_fall_back and not has_other_source:
            self._load(model, model_config)
            return
        self._reason = ""
        failure: Exception | None = None
        try:
            self._load(model, model_config)
        except Exception as exc:  # noqa: BLE001 - after any error, another source may succeed
            failure = exc
            self._reason = str(exc) if isinstance(exc, ModelExpressError) else headline_of(exc)
        # All ranks must use the same source and the same steps.
        lost_cache = failure is not None and self._read_from_cache
        failed, touched, lost_cache = any_rank(
            [failure is not None, self._destination.touched, lost_cache], of_draft=self._is_draft_model
        )
        if not failed:
            return
        if has_other_source and lost_cache:
            self._uses_cache = False
            self._why_no_cache = "another rank could not load from it" if failure is None else headline_of(failure)
            failure = None  # its traceback refers to the half-written model
            raise _SourceFailedError(f"the server's cache failed: {self._why_no_cache}")
        if not self._may_fall_back:
            raise failure or self._other_rank_error()
        failure = None  # as above
        self._warn_of_failure(touched=touched)
        if touched:
            self._destination.touch()  # also if only another rank's was touched: all ranks create their models again
        self._destination.prepare_for_next()
        self._leave_queue()
        with self._both_reasons(model_config):
            self._own.load_weights(model, model_config)

    # -- other workers ------------------------------------------------------------------------------------------------

    def _describe(self, model: nn.Module, model_config: ModelConfig, vllm_config: VllmConfig) -> None:
        """Describe this worker before its weights are there; without a description it reads and offers nothing."""
        self._worker, self._content_version = None, ""
        try:
            self._worker = Worker.of(vllm_config, model_config, model)
        except Exception as exc:  # noqa: BLE001 - storage needs no description
            self._why_no_worker = f"this worker could not be described: {headline_of(exc)}"
            _log.warning("ModelExpress neither reads from workers nor offers: %s", self._why_no_worker)

    def _load_from_workers(self, model: nn.Module, model_config: ModelConfig) -> bool:
        """Load the weights from other workers; return whether all ranks have them.

        Raises:
            _SourceFailedError: The load failed on some rank after it had begun to write on one, so that all ranks must
                create their models again.
        """
        wanted = self._wanted_of_workers(model, model_config)
        followed = self._wait_for_turn(wanted) if is_first_rank() and not isinstance(wanted, PeerResult) else False
        [followed] = any_rank([followed])
        result = wanted if isinstance(wanted, PeerResult) else self._read_workers(model, wanted, followed=followed)
        wanting, touched = any_rank([result.report is None, result.touched or result.report is not None])
        version = "" if result.report is None else result.report.content_version
        if not wanting and not same_on_all_ranks(number_of(version)):
            wanting, result = True, PeerResult(reason="the ranks found workers with different versions")
        if not wanting:
            self._content_version = version
            self._processed.enter_context(processed_weights())
            return True
        self._why_no_worker = result.reason or "another rank could not read from its worker; its log says why"
        if touched:
            self._reads_workers = False
            if not self._reads_storage:
                raise self._no_worker_error()
            raise _SourceFailedError(self._why_no_worker)
        return False

    def _wanted_of_workers(self, model: nn.Module, model_config: ModelConfig) -> _Wanted | PeerResult:
        """Return what this rank would read from a worker, or why it reads from none."""
        if self._worker is None:
            return PeerResult(reason=self._why_no_worker)
        reason = why_weights_do_not_travel(model)
        if reason:
            return PeerResult(reason=reason)
        sources = sources_of(model, model_config)
        try:
            streamed = streamed_uri(sources[0].model) if self._settings.model_uri is None else None
            uri = self._settings.model_uri or streamed or safetensors_of(self._own, sources[0])
        except Exception as exc:  # noqa: BLE001 - the load from storage reports it
            return PeerResult(reason=headline_of(exc))
        if len(sources) > 1 or uri is None:
            return PeerResult(reason="its weights come from more than one safetensors checkpoint")
        watch, plugins = self._observed(model_config)
        watch.why = "it holds the same tensors of the same version of the checkpoint"
        path = sources[0].model if streamed else uri
        version = "" if "://" in uri and uri != streamed else content_of_snapshot(path)
        return _Wanted(uri, self._worker.identity(model, version), self._worker.rank, plugins)

    def _wait_for_turn(self, wanted: _Wanted) -> bool:
        """Wait for the first engine of a rollout, if MX_FOLLOW is set; return whether it is ready.

        One rank waits for all: if each waited for its own rank, two engines could each be the first on one rank, and
        wait for the other.
        """
        if not self._reads_storage or self._turn is not None:
            return False
        share_log_level(logging.getLogger("modelexpress_core.sources.following"))  # a wait of minutes is not silent
        try:
            loader = Loader(None, wanted.plugins)
            request = loader.request(wanted.uri, identity=wanted.identity, worker_rank=wanted.rank)
            if from_env(FollowSettings, os.environ).seconds is not None:
                request = loader.with_content_version(request)
            self._turn = self._waiting.enter_context(loader.in_turn(request))
        except Exception as exc:  # noqa: BLE001 - storage needs no other worker
            _log.warning("ModelExpress does not wait for other workers (MX_FOLLOW): %s", headline_of(exc))
        return self._turn is not None and self._turn.waited is not None and self._turn.waited.followed

    def _leave_queue(self) -> None:
        """Let no other worker wait for this one, whose weights come from vLLM's own loader."""
        if self._turn is not None:
            self._turn.withdraw()

    def _read_workers(self, model: nn.Module, wanted: _Wanted, *, followed: bool) -> PeerResult:
        """Read from workers of this rank; where the first rank of another engine is ready, the others are so soon."""
        wait_seconds = _RANKS_SECONDS if followed and not is_first_rank() else 0.0
        return load_from_peers(
            tensors_of(model),
            wanted.uri,
            wanted.identity,
            worker_rank=wanted.rank,
            plugins=wanted.plugins,
            wait_seconds=wait_seconds if self._reads_storage else self._settings.query_timeout_seconds,
        )

    def _no_worker_error(self) -> ModelExpressError:
        why = self._why_no_worker or "neither MODEL_EXPRESS_URL nor MX_DISCOVERY is set"
        message = f"--load-format mx-target reads from workers alone, and none could be read: {why}"
        hint = "start a worker with --load-format mx-source or mx, or use --load-format mx here"
        return IncompleteLoadError(message, hint=hint)

    # -- storage ------------------------------------------------------------------------------------------------------

    def _is_fallback_allowed(self, model_config: ModelConfig) -> bool:
        if streamed_uri(model_config.model) is not None and self._settings.fallback is None:
            return False  # the files of vLLM's model are all but the weights
        # MX_MODEL_URI is not the address of a draft model with files of its own.
        return self._settings.may_fall_back or (self._has_own_files and self._settings.fallback is None)

    def get_all_weights(self, model_config: ModelConfig, model: nn.Module) -> PendingWeights:
        """Prepare a reload of ``model`` in place, which vLLM's ``reload_weights`` performs with the result.

        The model refuses to run until all ranks have loaded every byte of the same files. There is no fallback.

        Raises:
            ModelExpressError: The weights cannot be reloaded.
        """
        refuse_to_run(model, "a reload has begun and not ended")
        packed = layers_with_packed_copies(model)
        if packed:
            message = f"vLLM for CPUs cannot reload {len(packed)} layers of {model_config.model}: {listed(packed)}"
            cause = "their kernels keep a packed copy of the first weights"
            raise PlacementError(message, cause=cause, hint="restart vLLM")
        shared = shared_names(model)
        own_path = self._names.get(model, model_config.model if self._settings.model_uri is None else None)
        if own_path is None:
            message = f"MX_MODEL_URI does not say which weights to reload into {model_config.model}"
            cause = "another loader loaded the model, so that its first location is unknown"
            raise PlacementError(message, cause=cause, hint="start vLLM with --load-format mx, or unset MX_MODEL_URI")
        # vLLM replaced the name of the model if reload_weights got a path, and keeps it.
        self._explicit_path = model_config.model if model_config.model != own_path else None
        pending = PendingWeights()

        def load(load_weights: Callable[..., Any]) -> Any:
            try:
                loaded = self._reload(model, model_config, load_weights, shared)
            except BaseException as exc:
                refuse_to_run(model, headline_of(exc))
                try:
                    discard_reload(model, model_config)
                except Exception:  # noqa: BLE001 - the error of the reload matters more
                    _log.exception("vLLM could not discard a reload that failed; restart it")
                raise
            allow_to_run(model)
            publication = Publication.of(model)
            if publication is not None:
                publication.loaded(self._content_version)
            return loaded

        intercept_load_weights(model, pending, load)
        return pending

    def _reload(
        self,
        model: nn.Module,
        model_config: ModelConfig,
        load_weights: Callable[..., Any],
        shared: Mapping[str, frozenset[str]],
    ) -> Any:
        """Reload this rank's part. All ranks read the same files, and all fail if one fails."""
        # vLLM has given the parameters the shapes of the checkpoint, on the meta device.
        required = must_be_reloaded(model)
        failure: Exception | None = None
        with contextlib.ExitStack() as opening:
            opened = _Opened()
            try:
                opened = self._open(sources_of(model, model_config), opening, model_config, None)
            except Exception as exc:  # noqa: BLE001 - the other ranks must know of any error
                failure = exc
            self._agree(failure)
            if not same_on_all_ranks(opened.fingerprint()):
                message = f"the ranks opened different versions of {opened.uris()}"
                cause = "the files were replaced at this moment"
                raise SourceChangedError(message, cause=cause, hint="call reload_weights again")
            blocks = opening.pop_all()
        loaded = None
        try:
            with blocks:
                with fully_written(required, shared) as writes:
                    loaded = self._call(load_weights, model, opened.weights_in_layer_order(), opened)
                finish_reload(model, model_config)
                check_shared(model, writes, shared)
        except Exception as exc:  # noqa: BLE001 - see above
            failure = exc
        self._agree(failure)
        self._content_version = opened.content_version()
        return loaded

    def _agree(self, failure: Exception | None) -> None:
        """Raise on every rank if there is a failure on any."""
        [failed] = any_rank([failure is not None])
        if failure is not None:
            raise failure
        if failed:
            message = "another rank could not reload its weights"
            raise IncompleteLoadError(message, hint="its log says why; call reload_weights again, or restart vLLM")

    def _load(self, model: nn.Module, model_config: ModelConfig) -> None:
        self._destination = Destination()
        sources = sources_of(model, model_config)
        # With several checkpoints, each may lack tensors; a single one must hold all of them.
        quantized = model_config.quantization is not None
        required = must_be_loaded(model, quantized=quantized) if len(sources) == 1 else None
        with contextlib.ExitStack() as stack:
            opened = self._open(sources, stack, model_config, required)
            self._destination.touch()
            self._call(model.load_weights, model, opened.weights(), opened)
        self._content_version = opened.content_version()

    def _open(
        self,
        sources: Sequence[Source],
        stack: contextlib.ExitStack,
        model_config: ModelConfig,
        required: Mapping[str, torch.Tensor] | None,
    ) -> _Opened:
        """Open all sources, until ``stack`` ends. ``required``: parameters that each of them must write."""
        self._read_from_cache = False
        watch, plugins = self._observed(model_config)
        opened = _Opened()
        for source in sources:
            uri = self._uri_of(source, watch)
            if uri is None:
                _log.info("vLLM reads the weights itself, because its files are not a safetensors checkpoint")
                opened.parts.append(own_weights(self._own, source))
                continue
            if self._is_streamed(source, uri):
                opened.commit = content_of_snapshot(source.model)
            environ = os.environ if self._uses_cache else without_cache(os.environ)
            block = stack.enter_context(mx.deferred_weights(uri, model=required, environ=environ, plugins=plugins))
            self._read_from_cache |= bool(why_in_cache(str(block.checkpoint.uri), environ))
            opened.blocks.append(block)
            opened.parts.append(_Prefixed(source.prefix, block))
        return opened

    def _observed(self, model_config: ModelConfig) -> tuple[LoadWatch, mx.PluginManager]:
        """Return the plugins of a load, and the one of them that logs and counts it."""
        share_log_handlers(logging.getLogger("modelexpress_core"))
        plugins = mx.PluginManager.discover()
        model = model_config.model if streamed_uri(model_config.model) is None else name_of(model_config.model)
        watch = LoadWatch(_log, model, first_rank=is_first_rank(), bar=self.load_config.use_tqdm_on_load)
        plugins.register(watch, name="mx-vllm-watch")
        return watch, plugins

    def _call(self, load_weights: Any, model: nn.Module, weights: Any, opened: _Opened) -> Any:
        try:
            return load_weights(weights)
        except (KeyError, ValueError, AssertionError, IndexError) as exc:
            raise PlacementError(
                f"the code of {type(model).__name__} cannot load {opened.uris()}: {type(exc).__name__}: {exc}",
                cause="the checkpoint belongs to another model",
                hint="compare MX_MODEL_URI with --model; `mx inspect` lists the names",
            ) from exc

    def _uri_of(self, source: Source, watch: LoadWatch) -> str | None:
        """Return the URI or path to read ``source`` from; None if vLLM must read it."""
        if source.primary and self._explicit_path is not None:
            watch.why = "reload_weights names it"
            return self._explicit_path if "://" in self._explicit_path else safetensors_of(self._own, source)
        if source.primary and self._settings.model_uri is not None and not self._has_own_files:
            watch.why = "MX_MODEL_URI names it" + self._no_worker() + self._no_cache(self._settings.model_uri)
            return self._settings.model_uri
        streamed = streamed_uri(source.model) if source.primary else None
        if streamed is not None:
            watch.why = "vLLM's configuration came from there" + self._no_worker()
            return streamed
        watch.why = "vLLM found it for its model" + (" and MX_MODEL_URI is not set" if source.primary else "")
        watch.why += self._no_worker()
        return safetensors_of(self._own, source)

    @staticmethod
    def _is_streamed(source: Source, uri: str) -> bool:
        return source.primary and uri == streamed_uri(source.model)

    def _no_worker(self) -> str:
        return f", and no worker is read: {self._why_no_worker}" if self._why_no_worker else ""

    def _no_cache(self, uri: str) -> str:
        reason = why_not_in_cache(uri, os.environ) if self._uses_cache else f"it failed: {self._why_no_cache}"
        return f", and the server's cache is not used: {reason}" if reason else ""

    def _has_source_besides_cache(self) -> bool:
        """Whether MX_MODEL_URI can be read if the cache of the server fails; the same on all ranks."""
        if self._has_own_files or self._settings.model_uri is None or not self._uses_cache:
            return False
        return is_cache_used(os.environ) and not why_in_cache(self._settings.model_uri, os.environ)

    @staticmethod
    def _other_rank_error() -> ModelExpressError:
        return IncompleteLoadError("another rank could not load its weights", hint="its log says why")

    def _warn_of_failure(self, *, touched: bool) -> None:
        into = "a new model" if touched else "the model, which is still unchanged"
        if self._reason:
            _log.warning(
                "ModelExpress could not load the weights, so vLLM's own loader loads them into %s "
                "(MX_FALLBACK=0 prevents this): %s",
                into,
                self._reason,
            )
        else:
            self._reason = "another rank could not load its weights; its log says why"
            _log.warning("ModelExpress could not load the weights of another rank, so vLLM's own loader loads all")

    @contextlib.contextmanager
    def _both_reasons(self, model_config: ModelConfig) -> Iterator[None]:
        try:
            yield
        except Exception as exc:
            message = f"neither ModelExpress nor vLLM's own loader can load {model_config.model}: {self._reason}"
            cause = f"the error of vLLM's loader is: {exc}"
            hint = "fix the first error; MX_FALLBACK=0 shows it alone"
            raise IncompleteLoadError(message, cause=cause, hint=hint) from exc


@frozen
class _Wanted:
    """What a rank reads from other workers.

    Attributes:
        uri: The checkpoint with the same weights.
        identity: Identity of the tensors.
        rank: Rank of the part of the model.
        plugins: Plugins to use.
    """

    uri: str
    identity: mx.SourceIdentity
    rank: int
    plugins: mx.PluginManager


class _SourceFailedError(ModelExpressError):
    """A load from workers or from the server failed after it had begun to write: the model must be created again."""


class _Opened:
    """The sources of a load, open.

    Attributes:
        blocks: Those that ModelExpress reads.
        parts: The weights of each source, with their prefix.
        commit: Content version of a commit of the Hub, if one was asked for.
    """

    commit: str = ""

    def __init__(self) -> None:
        self.blocks: list[mx.DeferredWeights] = []
        self.parts: list[Iterable[tuple[str, torch.Tensor]]] = []

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the weights of all sources."""
        return itertools.chain.from_iterable(self.parts)

    def weights_in_layer_order(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Return the weights of all sources; deferred ones in the order of layers, which costs no memory."""
        for part in self.parts:
            yield from in_layer_order(part) if isinstance(part, _Prefixed) else part

    def uris(self) -> str:
        """Return the redacted URIs, for messages."""
        return ", ".join(str(block.checkpoint.uri) for block in self.blocks) or "the files of vLLM's model"

    def content_version(self) -> str:
        """Return the version of what was loaded, once it was; empty if other machines cannot tell it."""
        if len(self.blocks) != 1 or len(self.parts) != 1 or self.blocks[0].report is None:
            return ""
        if self.commit:
            return self.commit
        uri = self.blocks[0].checkpoint.uri
        return self.blocks[0].report.content_version or (content_of_snapshot(uri.path) if uri.scheme == "file" else "")

    def fingerprint(self) -> int:
        """Return a number of 62 bits that differs if files differ.

        The version of a local file holds its inode and times, which differ between hosts that have copies.
        """
        digest = hashlib.sha256()
        for block in self.blocks:
            local = block.checkpoint.uri.scheme == "file"
            for file in block.checkpoint.files:
                digest.update(repr((file.name, file.size, None if local else file.version)).encode())
        return int.from_bytes(digest.digest()[:8], "big") >> 2


class _Prefixed:
    """Deferred weights with a prefix for their names."""

    def __init__(self, prefix: str, weights: mx.DeferredWeights) -> None:
        self._prefix = prefix
        self._weights = weights

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return ((self._prefix + name, tensor) for name, tensor in self._weights)
