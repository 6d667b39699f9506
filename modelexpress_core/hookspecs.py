"""The hook contract: every function that a plugin may implement, and nothing else.

A plugin is a distribution with one entry point in the group ``modelexpress.plugins``. The entry point has the
distribution's name and points to a module (by convention ``plugin``) that holds functions marked with
``modelexpress_core.hooks.hookimpl``::

    [project.entry-points."modelexpress.plugins"]
    mx-hello = "mx_hello.plugin"

There are three kinds of hook:

- **register** hooks (``mx_register_*``) take no arguments, do no I/O and return records. They are called once, when
  plugins are loaded. Core checks the records and looks schemes up in tables from then on.
- **policy** hooks decide. The first plugin that returns something other than None settles the matter.
- **observe** hooks (``mx_load_*``) are told what happens. Their result is ignored and their exceptions are contained.

Tensors and bytes never pass through a hook. Importing a plugin module must not import torch or an SDK.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from modelexpress_core.hooks import hookspec

if TYPE_CHECKING:
    from modelexpress_core.contracts.candidates import Candidate, LoadRequest
    from modelexpress_core.events import LoadFailed, LoadFinished, LoadProgress, LoadStarted
    from modelexpress_core.providers import (
        AuthenticatorProvider,
        CommandProvider,
        DiscoveryProvider,
        MetadataStoreProvider,
        ServerServiceProvider,
        StorageProvider,
        TransportProvider,
    )
    from modelexpress_core.uri import ModelURI


@hookspec
def mx_register_storages() -> Iterable[StorageProvider]:  # type: ignore[empty-body]  # a specification
    """Storages that this plugin offers.

    Not called again after plugins are loaded, and never once per URI: schemes are looked up in a table.

    Example:
        >>> from modelexpress_core.hooks import hookimpl
        >>> from modelexpress_core.providers import StorageProvider
        >>> def open_hello(uri, settings):
        ...     from mx_hello._storage import HelloStorage
        ...
        ...     return HelloStorage(uri.authority)
        >>> @hookimpl
        ... def mx_register_storages():
        ...     return [StorageProvider("mx-hello", ("hello",), open_hello)]
        >>> mx_register_storages()[0].schemes
        ('hello',)
    """


@hookspec
def mx_register_transports() -> Iterable[TransportProvider]:  # type: ignore[empty-body]  # a specification
    """Ways to pull tensors out of a peer's memory.

    Not called to open a connection: that is the factory's part, when a candidate of the scheme is tried.

    Example:
        >>> from modelexpress_core.hooks import hookimpl
        >>> from modelexpress_core.providers import TransportProvider
        >>> @hookimpl
        ... def mx_register_transports():
        ...     return [TransportProvider("mx-carrier-pigeon", ("pigeon",), lambda uri, settings: ...)]
        >>> mx_register_transports()[0].name
        'mx-carrier-pigeon'
    """


@hookspec
def mx_register_discoveries() -> Iterable[DiscoveryProvider]:  # type: ignore[empty-body]  # a specification
    """Ways to find who holds a model now.

    Not called during a load: the factory's product is asked then.

    Example:
        >>> from modelexpress_core.hooks import hookimpl
        >>> from modelexpress_core.providers import DiscoveryProvider
        >>> @hookimpl
        ... def mx_register_discoveries():
        ...     return [DiscoveryProvider("mx-consul", ("consul",), lambda uri, settings: ...)]
        >>> mx_register_discoveries()[0].schemes
        ('consul',)
    """


@hookspec
def mx_register_metadata_stores() -> Iterable[MetadataStoreProvider]:  # type: ignore[empty-body]  # a specification
    """Places where a server may keep its metadata.

    Not called in workers' loads to any effect: only a server opens a metadata store.

    Example:
        >>> from modelexpress_core.hooks import hookimpl
        >>> from modelexpress_core.providers import MetadataStoreProvider
        >>> @hookimpl
        ... def mx_register_metadata_stores():
        ...     return [MetadataStoreProvider("mx-etcd", ("etcd",), lambda uri, settings: ...)]
        >>> mx_register_metadata_stores()[0].schemes
        ('etcd',)
    """


@hookspec
def mx_register_authenticators() -> Iterable[AuthenticatorProvider]:  # type: ignore[empty-body]  # a specification
    """Ways to authenticate the calls that servers and workers answer.

    Not called for a call: ``MX_AUTH_MODE`` selects one by its name, and its factory is called once, at the start.

    Example:
        >>> from modelexpress_core.contracts.authenticator import Refusal, RefusedError
        >>> from modelexpress_core.hooks import hookimpl
        >>> from modelexpress_core.providers import AuthenticatorProvider
        >>> class Doorbell:
        ...     by_certificate = False
        ...
        ...     async def authenticate(self, call):
        ...         if call.token != "knock knock":
        ...             raise RefusedError(Refusal.UNAUTHENTICATED, "wrong token")
        ...         return "visitor"
        >>> @hookimpl
        ... def mx_register_authenticators():
        ...     return [AuthenticatorProvider("doorbell", lambda settings: Doorbell())]
        >>> mx_register_authenticators()[0].name
        'doorbell'
    """


@hookspec
def mx_register_server_services() -> Iterable[ServerServiceProvider]:  # type: ignore[empty-body]  # a specification
    """GRPC services that ``mx serve`` offers beside its own.

    Not used where no server runs in the process. The factory is called once, when the server starts.

    Example:
        >>> from modelexpress_core.hooks import hookimpl
        >>> from modelexpress_core.providers import ServerServiceProvider
        >>> def make_audit(context):
        ...     import grpc
        ...
        ...     async def count(request, rpc):
        ...         return str(sum((await context.store.counts()).values())).encode()
        ...
        ...     handlers = {"Count": grpc.unary_unary_rpc_method_handler(count)}
        ...     return grpc.method_handlers_generic_handler("acme.audit.AuditService", handlers)
        >>> @hookimpl
        ... def mx_register_server_services():
        ...     return [ServerServiceProvider("acme.audit.AuditService", make_audit)]
        >>> mx_register_server_services()[0].name
        'acme.audit.AuditService'
    """


@hookspec
def mx_register_commands() -> Iterable[CommandProvider]:  # type: ignore[empty-body]  # a specification
    """Subcommands of ``mx``.

    Not used where the library is called from Python.

    Example:
        >>> from modelexpress_core.hooks import hookimpl
        >>> from modelexpress_core.providers import CommandProvider
        >>> def greet():
        ...     print("hello")
        >>> @hookimpl
        ... def mx_register_commands():
        ...     return [CommandProvider("greet", lambda: greet, help="Say hello.")]
        >>> mx_register_commands()[0].name
        'greet'
    """


@hookspec(firstresult=True)
def mx_rewrite_uri(uri: ModelURI) -> ModelURI | None:
    """Another URI to use in place of ``uri``, or None to leave it.

    Not called for the candidates that a discovery returns, nor again for the URI that it returned.

    Example:
        >>> from modelexpress_core.hooks import hookimpl
        >>> from modelexpress_core.uri import ModelURI
        >>> @hookimpl
        ... def mx_rewrite_uri(uri):
        ...     if uri.scheme == "models":
        ...         return ModelURI.parse(f"s3://company-models/{uri.authority}/{uri.path}")
        >>> str(mx_rewrite_uri(ModelURI.parse("models://llama/v3")))
        's3://company-models/llama/v3'
    """


@hookspec(firstresult=True)
def mx_rank_candidates(request: LoadRequest, candidates: Sequence[Candidate]) -> Sequence[Candidate] | None:
    """The candidates to try, best first, or None to leave that to the next plugin.

    Leaving a candidate out means that it is not tried. Not called where there is no candidate at all.

    Example:
        >>> from modelexpress_core.hooks import hookimpl
        >>> from modelexpress_core.contracts.candidates import Candidate, LoadRequest
        >>> from modelexpress_core.uri import ModelURI
        >>> @hookimpl
        ... def mx_rank_candidates(request, candidates):
        ...     return sorted(candidates, key=lambda candidate: candidate.uri.scheme != "file")
        >>> both = [Candidate(ModelURI.parse("s3://bucket/model")), Candidate(ModelURI.parse("/models/model"))]
        >>> [str(c.uri) for c in mx_rank_candidates(LoadRequest(both[0].uri), both)]
        ['file:///models/model', 's3://bucket/model']
    """


@hookspec
def mx_load_started(event: LoadStarted) -> None:
    """A checkpoint is open and its weights are about to be fetched.

    Not called where the checkpoint could not be opened; ``mx_load_failed`` is then.

    Example:
        >>> from modelexpress_core.hooks import hookimpl
        >>> @hookimpl
        ... def mx_load_started(event):
        ...     print(f"loading {event.tensors} tensors from {event.uri}")
    """


@hookspec
def mx_load_progress(event: LoadProgress) -> None:
    """Bytes arrived. Called a few times a second, from a thread that fetches: be quick.

    Not called for every chunk, and not at all in a load that ends at once.

    Example:
        >>> from modelexpress_core.hooks import hookimpl
        >>> @hookimpl
        ... def mx_load_progress(event):
        ...     print(f"{event.bytes_done}/{event.bytes_planned} bytes, {event.eta_seconds} s left")
    """


@hookspec
def mx_load_finished(event: LoadFinished) -> None:
    """Every planned byte is in place.

    Not called where anything is missing; ``mx_load_failed`` is then.

    Example:
        >>> from modelexpress_core.hooks import hookimpl
        >>> @hookimpl
        ... def mx_load_finished(event):
        ...     print(event.report)
    """


@hookspec
def mx_load_failed(event: LoadFailed) -> None:
    """A load ended with an error, which is raised to the caller after this.

    Not called for errors in the arguments of a call, before any load began.

    Example:
        >>> from modelexpress_core.hooks import hookimpl
        >>> @hookimpl
        ... def mx_load_failed(event):
        ...     print(f"{event.uri}: {event.error}")
    """
