"""The hook contract: every function that a plugin may implement.

A plugin is a distribution with one entry point in the group ``modelexpress.plugins``. The entry point has the
distribution's name and points to a module (by convention ``plugin``). The module holds functions that are marked with
``modelexpress_core.hookimpl``::

    [project.entry-points."modelexpress.plugins"]
    mx-hello = "mx_hello.plugin"

There are three kinds of hook:

- **Register** hooks (``mx_register_*``) take no arguments, do no I/O and return records. They are called once, when
  plugins are loaded. Core checks the records and builds tables from them.
- **Policy** hooks decide. The first result other than None counts. An exception fails the load and names the plugin.
- **Observe** hooks (``mx_load_*``) get one frozen event. Core ignores their result, and catches and logs their
  exceptions.

A function takes as many of a hook's arguments as it needs, by name. Tensors and bytes never pass through a hook.
Importing a plugin module must not import torch or an SDK: factories import them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
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
    """Register storages, which read checkpoints.

    Called once, when plugins are loaded. Never called for a URI: core looks up its scheme in a table of the records.

    Example:
        >>> from modelexpress_core import hookimpl
        >>> from modelexpress_core.providers import StorageCapabilities, StorageProvider
        >>> def open_hello(uri, settings):
        ...     from mx_hello._storage import HelloStorage  # imports the SDK, at first use
        ...
        ...     return HelloStorage(uri.authority)
        >>> @hookimpl
        ... def mx_register_storages():
        ...     capabilities = StorageCapabilities(concurrency=16, request_cost_bytes=1 << 20)
        ...     return [StorageProvider("mx-hello", ("hello",), open_hello, capabilities=capabilities)]
        >>> mx_register_storages()[0].schemes
        ('hello',)
    """


@hookspec
def mx_register_transports() -> Iterable[TransportProvider]:  # type: ignore[empty-body]  # a specification
    """Register transports, which read tensors from the memory of other workers.

    Called once, when plugins are loaded. Not called to open a connection: core calls the record's factory for that.

    Example:
        >>> from modelexpress_core import hookimpl
        >>> from modelexpress_core.providers import TransportProvider
        >>> def open_rdma(uri, settings):
        ...     from mx_rdma._transport import RdmaTransport
        ...
        ...     return RdmaTransport(uri)
        >>> @hookimpl
        ... def mx_register_transports():
        ...     return [TransportProvider("mx-rdma", ("rdma",), open_rdma)]
        >>> mx_register_transports()[0].name
        'mx-rdma'
    """


@hookspec
def mx_register_discoveries() -> Iterable[DiscoveryProvider]:  # type: ignore[empty-body]  # a specification
    """Register discoveries, which find the workers and places that hold a model.

    Called once, when plugins are loaded. Not called during a load: core calls the record's factory, and the discovery
    that it returns.

    Example:
        >>> from modelexpress_core import hookimpl
        >>> from modelexpress_core.providers import DiscoveryProvider
        >>> def open_consul(uri, settings):
        ...     from mx_consul._discovery import ConsulDiscovery
        ...
        ...     return ConsulDiscovery(uri.authority)
        >>> @hookimpl
        ... def mx_register_discoveries():
        ...     return [DiscoveryProvider("mx-consul", ("consul",), open_consul)]
        >>> mx_register_discoveries()[0].schemes
        ('consul',)
    """


@hookspec
def mx_register_metadata_stores() -> Iterable[MetadataStoreProvider]:  # type: ignore[empty-body]  # a specification
    """Register metadata stores, in which a server keeps its metadata.

    Called once, when plugins are loaded. Not used by loads: only a server opens a metadata store.
    ``modelexpress_core.testing.MetadataStoreContract`` tests one.

    Example:
        >>> from modelexpress_core import hookimpl
        >>> from modelexpress_core.providers import MetadataStoreProvider
        >>> def open_etcd(uri, settings):
        ...     from mx_etcd._store import EtcdStore
        ...
        ...     return EtcdStore(uri.authority)
        >>> @hookimpl
        ... def mx_register_metadata_stores():
        ...     return [MetadataStoreProvider("mx-etcd", ("etcd",), open_etcd)]
        >>> mx_register_metadata_stores()[0].schemes
        ('etcd',)
    """


@hookspec
def mx_register_authenticators() -> Iterable[AuthenticatorProvider]:  # type: ignore[empty-body]  # a specification
    """Register authenticators, which name the callers of servers and workers.

    Called once, when plugins are loaded. Not called for each call: ``MX_AUTH_MODE`` selects an authenticator by its
    name, and core calls its factory once, when the server starts.

    Example:
        >>> from modelexpress_core import hookimpl
        >>> from modelexpress_core.contracts.authenticator import Refusal, RefusedError
        >>> from modelexpress_core.providers import AuthenticatorProvider
        >>> class PasswordAuthenticator:
        ...     by_certificate = False
        ...
        ...     def __init__(self, password):
        ...         self._password = password
        ...
        ...     async def authenticate(self, call):
        ...         if call.token != self._password:
        ...             raise RefusedError(Refusal.UNAUTHENTICATED, "wrong password")
        ...         return "worker"
        >>> @hookimpl
        ... def mx_register_authenticators():
        ...     return [AuthenticatorProvider("password", lambda settings: PasswordAuthenticator(settings["PASSWORD"]))]
        >>> mx_register_authenticators()[0].name
        'password'
    """


@hookspec
def mx_register_server_services() -> Iterable[ServerServiceProvider]:  # type: ignore[empty-body]  # a specification
    """Register gRPC services that ``mx serve`` offers in addition to its own.

    Called once, when plugins are loaded. Not used unless a server runs in the process; then core calls the record's
    factory once, when the server starts.

    The factory gets a ``ServiceContext`` and returns a ``grpc.GenericRpcHandler``: the result of
    ``grpc.method_handlers_generic_handler``, or ``context.handler(add_AuditServicer_to_server, servicer)`` for a
    service that protoc generated. Methods are coroutines or asynchronous generators. The server lists the service in
    ``grpc.health.v1.Health``, and logs, traces and counts its calls as those of its own services. An exception is
    logged and answered with INTERNAL. Methods under other service names are not served. The server does not start if
    the factory fails, or if the server or another plugin has a service of the same name; the message names the plugin.

    Example:
        >>> from modelexpress_core import hookimpl
        >>> from modelexpress_core.providers import ServerServiceProvider
        >>> def make_audit(context):
        ...     import grpc  # at first use, like an SDK
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
    """Register subcommands of ``mx``.

    Called once, when plugins are loaded. Not used if the library is called from Python. If ``mx`` itself has a command
    of that name, it ignores the plugin's and warns.

    Example:
        >>> from modelexpress_core import hookimpl
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
def mx_rewrite_uri(uri: ModelURI, environ: Mapping[str, str]) -> ModelURI | None:
    """Return another URI to load from in place of ``uri``, or None to keep it.

    Called once for each load, with the URI that the caller passed and the environment variables of the load. An
    implementation that needs no variables leaves ``environ`` out of its arguments. Not called for the candidates
    that a discovery returns, nor again for the URI that this hook returned.

    Example:
        >>> from modelexpress_core import ModelURI, hookimpl
        >>> @hookimpl
        ... def mx_rewrite_uri(uri):
        ...     if uri.scheme == "models":
        ...         return ModelURI.parse(f"s3://company-models/{uri.authority}/{uri.path}")
        >>> str(mx_rewrite_uri(ModelURI.parse("models://llama/v3")))
        's3://company-models/llama/v3'
    """


@hookspec(firstresult=True)
def mx_rank_candidates(request: LoadRequest, candidates: Sequence[Candidate]) -> Sequence[Candidate] | None:
    """Return the candidates to try, best first, or None to leave the decision to the next plugin.

    Called once for each load, with the places that may hold the model. A candidate that is missing from the result is
    not tried. Not called if there is no candidate at all.

    Example:
        >>> from modelexpress_core import ModelURI, hookimpl
        >>> from modelexpress_core.contracts.candidates import Candidate, LoadRequest
        >>> @hookimpl
        ... def mx_rank_candidates(request, candidates):
        ...     return sorted(candidates, key=lambda candidate: candidate.uri.scheme != "file")  # local files first
        >>> both = [Candidate(ModelURI.parse("s3://bucket/model")), Candidate(ModelURI.parse("/models/model"))]
        >>> [str(c.uri) for c in mx_rank_candidates(LoadRequest(both[0].uri), both)]
        ['file:///models/model', 's3://bucket/model']
    """


@hookspec
def mx_load_started(event: LoadStarted) -> None:
    """Observe that a load begins.

    Called when a checkpoint is open, before its weights are fetched. Not called if the checkpoint cannot be opened:
    ``mx_load_failed`` is called then.

    Example:
        >>> from modelexpress_core import hookimpl
        >>> @hookimpl
        ... def mx_load_started(event):
        ...     print(f"loading {event.tensors} tensors from {event.uri}")
    """


@hookspec
def mx_load_progress(event: LoadProgress) -> None:
    """Observe the progress of a load.

    Called a few times a second while bytes arrive, and once at the end, from a thread that fetches: return quickly.
    Not called for every chunk.

    Example:
        >>> from modelexpress_core import hookimpl
        >>> @hookimpl
        ... def mx_load_progress(event):
        ...     print(f"{event.bytes_done} of {event.bytes_planned} bytes, limited by {event.limiter or 'unknown'}")
    """


@hookspec
def mx_load_finished(event: LoadFinished) -> None:
    """Observe that a load has ended well.

    Called when every planned byte is in place and verified. Not called if anything is missing: ``mx_load_failed`` is
    called then.

    Example:
        >>> from modelexpress_core import hookimpl
        >>> @hookimpl
        ... def mx_load_finished(event):
        ...     print(f"{event.report.goodput_bytes_per_second:.0f} bytes/s from {event.report.uri}")
    """


@hookspec
def mx_load_failed(event: LoadFailed) -> None:
    """Observe that a load has failed.

    Called before the error is raised to the caller. If several candidates are tried, it is called for each that failed.
    Not called for errors in the arguments of a call, before any load begins.

    Example:
        >>> from modelexpress_core import hookimpl
        >>> @hookimpl
        ... def mx_load_failed(event):
        ...     print(f"{event.uri}: {type(event.error).__name__} after {event.seconds:.1f} s")
    """
