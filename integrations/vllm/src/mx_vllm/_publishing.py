"""Offers the tensors of a model of vLLM to other workers while they do not change.

A model is offered once the engine is ready. It is withdrawn before vLLM changes its weights, and offered again, under
the identity of its new content, when they no longer change.
"""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any, ClassVar
from weakref import WeakKeyDictionary, ref

from torch import nn

import modelexpress_core as mx
from modelexpress_core.errors import ModelExpressError
from modelexpress_core.messages import listed
from modelexpress_core.settings import from_env
from modelexpress_core.sources.settings import FollowSettings
from mx_vllm._identity import Worker, tensors_of
from mx_vllm._vllm import READY, watch_workers, why_weights_do_not_travel

__all__ = ["Publication", "watch_changes"]

_log = logging.getLogger("vllm.modelexpress")


class Publication:
    """One model of this process, offered while its weights are complete and nothing changes them.

    No error of it ends the engine: a worker that cannot offer its tensors still serves.

    Args:
        model: The model, with its weights, as vLLM runs it.
        worker: This process, described before the weights were loaded.
        content_version: Version of what was loaded.
    """

    _of: ClassVar[WeakKeyDictionary[nn.Module, Publication]] = WeakKeyDictionary()

    def __init__(self, model: nn.Module, worker: Worker, content_version: str) -> None:
        self._model = ref(model)
        self._worker = worker
        self._content_version = content_version
        self._ready = False
        self._changing: set[str] = set()
        self._offer = contextlib.ExitStack()
        self._offered = False
        self._of[model] = self

    @classmethod
    def of(cls, model: nn.Module) -> Publication | None:
        """Return the publication of ``model``; None if it was not loaded for one."""
        return cls._of.get(model)

    def engine_ready(self) -> None:
        """Offer the model, from when vLLM has started."""
        self._ready = True
        self._update()

    def loaded(self, content_version: str) -> None:
        """Note what a reload has loaded; empty if nobody can tell."""
        self._content_version = content_version

    def begin_change(self, what: str) -> None:
        """Withdraw the model, before ``what`` changes its weights; returns when no reader uses them any more."""
        self._changing.add(what)
        if self._offered:
            _log.info("ModelExpress withdraws the weights, because of %s", what)
            self._withdraw()

    def end_change(self, what: str) -> None:
        """Offer the model again, unless something else still changes its weights."""
        self._changing.discard(what)
        self._update()

    def _update(self) -> None:
        if not self._ready or self._changing or self._offered:
            return
        model = self._model()
        if model is None:
            return
        try:
            reason = self._why_not(model)
            if reason:
                _log.info("ModelExpress does not offer the weights of this worker: %s", reason)
                _leave_queue()
                return
            self._publish(model)
        except Exception as exc:  # noqa: BLE001 - the engine serves without it
            cause = str(exc) if isinstance(exc, ModelExpressError) else f"{type(exc).__name__}: {exc}"
            _log.warning("ModelExpress cannot offer the weights of this worker: %s", cause)
            _leave_queue()
            self._withdraw()

    def _publish(self, model: nn.Module) -> None:
        offer = self._offer.enter_context(
            mx.publish(
                tensors_of(model),
                identity=self._worker.identity(model, self._content_version),
                worker_rank=self._worker.rank,
                device=self._worker.device,
            )
        )
        self._offered = True
        _log.info(
            "ModelExpress offers the weights of rank %d of %s to other workers, over %s, as worker %s",
            self._worker.rank,
            self._worker.model_name,
            ", ".join(offer.transports),
            offer.worker_id,
        )

    def _why_not(self, model: nn.Module) -> str:
        if not self._content_version:
            return "it cannot be told which version of the checkpoint they are"
        return why_weights_do_not_travel(model) or self._why_changed(model)

    def _why_changed(self, model: nn.Module) -> str:
        layout = self._worker.identity(model, self._content_version).extra_parameters["layout_signature"]
        if layout == self._worker.layout:
            return ""
        empty = [name for name, parameter in model.named_parameters() if not parameter.numel()]
        if empty:
            packed = f"{len(empty)} parameters hold no bytes, since vLLM packed them for its kernels"
            return f"{packed}: {listed(empty)}"
        return "vLLM gave its tensors another layout after they were loaded"

    def _withdraw(self) -> None:
        self._offered = False
        try:
            self._offer.close()
        except Exception:  # noqa: BLE001 - as above
            _log.exception("ModelExpress could not withdraw the weights in order")


def _leave_queue() -> None:
    """Let no other worker wait for this one, which offers nothing."""
    if from_env(FollowSettings, os.environ).seconds is not None:
        from modelexpress_core.sources.following import (
            withdraw_announcements,
        )  # needs gRPC, which a load may do without

        withdraw_announcements()


def watch_changes() -> None:
    """Let the publications of this process follow what vLLM does with its models; may be called repeatedly."""
    watch_workers(_before, _after)


def _before(model: nn.Module, method: str, arguments: dict[str, Any]) -> None:
    publication = Publication.of(model)
    if publication is None or method in (READY, "wake_up"):
        return
    publication.begin_change(method)
    if method != "sleep" or arguments.get("level", 1) > 1:
        publication.loaded("")  # until a reload says what it has loaded


def _after(model: nn.Module, method: str, arguments: dict[str, Any]) -> None:
    publication = Publication.of(model)
    if publication is None:
        return
    if method == READY:
        publication.engine_ready()
    elif method == "wake_up":
        tags = arguments.get("tags")
        if tags is None or "weights" in tags:
            publication.end_change("sleep")
    elif method not in ("sleep", "shutdown"):
        publication.end_change(method)
