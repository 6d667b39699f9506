"""Every error that ModelExpress raises, and the parts of its message.

::

    ModelExpressError
    ├── SettingsError                 a variable or option has a value that cannot be used
    ├── PluginError                   a plugin cannot be used (.plugin names its distribution)
    │   ├── PluginLoadError           it does not import, or breaks the hook contract
    │   ├── PluginConflictError       two plugins claim one scheme, and no setting selects one
    │   └── PluginApiError            it was written for another version of the hook contract
    ├── ResolveError                  a URI has no place to load from
    │   ├── InvalidURIError           it is not a URI
    │   └── UnknownSchemeError        no installed plugin handles its scheme
    ├── CheckpointError               the files are no valid checkpoint (.uri .file)
    ├── PlacementError                the destination does not fit the checkpoint (.tensor)
    ├── IncompleteLoadError           part of the model was not written (.missing .unexpected)
    ├── ResourceError                 this machine has too little memory, or starts no more threads
    └── BackendError                  a storage or a peer failed (.uri .provider .retryable .peer_at_fault)
        ├── NotFoundError
        ├── AccessDeniedError
        ├── UnavailableError          a temporary fault, unreachable, connection lost: a retry may help
        │   ├── StillArrivingError    the bytes are on their way to the server: wait while they come (.present_bytes)
        │   └── ThrottledError        it receives too many requests: retry later, with fewer at a time
        ├── DeadlineError             no answer in time
        ├── IntegrityError            the bytes differ from those that were stored
        ├── SourceChangedError        the object has another version than at the start of the load
        └── UnsupportedError          the backend does not support this

A backend classifies errors: its class and ``.retryable`` say whether a retry can help.
Only ``modelexpress_core.fetch.retry`` retries.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, ClassVar

from modelexpress_core.messages import hide_credentials_of_urls, printable_lines

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "AccessDeniedError",
    "BackendError",
    "CheckpointError",
    "DeadlineError",
    "IncompleteLoadError",
    "IntegrityError",
    "InvalidURIError",
    "ModelExpressError",
    "NotFoundError",
    "PlacementError",
    "PluginApiError",
    "PluginConflictError",
    "PluginError",
    "PluginLoadError",
    "ResolveError",
    "ResourceError",
    "SettingsError",
    "SourceChangedError",
    "StillArrivingError",
    "ThrottledError",
    "UnavailableError",
    "UnknownSchemeError",
    "UnsupportedError",
]


class ModelExpressError(Exception):
    """Base of all our errors.

    Args:
        message: What happened, naming the object and the operation.
        cause: The likely cause, if the message does not show it.
        hint: What to do next.
    """

    def __init__(self, message: str, *, cause: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.cause = cause
        self.hint = hint

    def __str__(self) -> str:
        parts = [self.headline]
        if self.cause:
            parts.append(f"Likely cause: {_sentence(self.cause)}")
        if self.hint:
            parts.append(f"Next step: {_sentence(self.hint)}")
        # Plugins and SDKs may put names of others into a message, and users URLs in place of something else.
        return printable_lines(hide_credentials_of_urls("\n".join(parts)))

    @property
    def headline(self) -> str:
        """What happened, without cause and next step."""
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Engines pass errors between processes; by default pickle would call the class with the message alone.
        return _rebuild, (type(self), self.args, self.__dict__)


#: A text that ends with a command, which is copied to the end of its line.
_ENDS_WITH_COMMAND = re.compile(r"pip install [^;`\n]+\Z")


def _sentence(text: str) -> str:
    ends = text.endswith((".", "?", "!")) or _ENDS_WITH_COMMAND.search(text)
    return text if ends else f"{text}."


def _rebuild(cls: type[ModelExpressError], args: tuple[Any, ...], state: dict[str, Any]) -> ModelExpressError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


class SettingsError(ModelExpressError):
    """Variables or options have values that cannot be used. The message names all of them."""


class PluginError(ModelExpressError):
    """A plugin cannot be used.

    Args:
        message: What happened.
        plugin: Name of the distribution that caused the error.
        cause: The likely cause.
        hint: What to do next.
    """

    def __init__(
        self,
        message: str,
        *,
        plugin: str,
        cause: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, cause=cause, hint=hint)
        self.plugin = plugin


class PluginLoadError(PluginError):
    """A plugin does not import, or breaks the hook contract."""


class PluginConflictError(PluginError):
    """Two plugins claim one scheme, and no setting selects one."""


class PluginApiError(PluginError):
    """A plugin was written for another version of the hook contract."""


class ResolveError(ModelExpressError):
    """A URI has no place to load from."""


class InvalidURIError(ResolveError):
    """The text is not a URI that ModelExpress understands."""


class UnknownSchemeError(ResolveError):
    """No usable plugin handles the scheme of the URI."""


class CheckpointError(ModelExpressError):
    """The files were read, and are no valid checkpoint.

    Args:
        message: What is wrong.
        uri: Redacted URI of the checkpoint.
        file: The invalid file, relative to the checkpoint.
        cause: The likely cause.
        hint: What to do next.
    """

    def __init__(
        self,
        message: str,
        *,
        uri: str = "",
        file: str = "",
        cause: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, cause=cause, hint=hint)
        self.uri = uri
        self.file = file


class PlacementError(ModelExpressError):
    """A destination does not fit the tensors of the checkpoint.

    Args:
        message: What does not fit.
        tensor: Name of the tensor.
        cause: The likely cause.
        hint: What to do next.
    """

    def __init__(
        self,
        message: str,
        *,
        tensor: str = "",
        cause: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, cause=cause, hint=hint)
        self.tensor = tensor


class IncompleteLoadError(ModelExpressError):
    """A load ended before everything was in place.

    Args:
        message: What is incomplete.
        missing: Names of the destinations that were not written, or only in part.
        unexpected: Names of the tensors in the checkpoint that have no destination.
        cause: The likely cause.
        hint: What to do next.
    """

    def __init__(
        self,
        message: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        cause: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, cause=cause, hint=hint)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)


class ResourceError(ModelExpressError):
    """This machine, or a device of it, has too little memory, or starts no more threads."""


class BackendError(ModelExpressError):
    """A storage or a peer failed.

    Args:
        reason: What came back, without the URI, which the message puts in front.
        uri: Redacted URI of the object.
        operation: The operation that failed, as a verb phrase: ``"read bytes 0-99"``.
        provider: Name of the plugin.
        retryable: Whether the same request may succeed later; by default a property of the class.
        peer_at_fault: Whether the peer caused the error, so that other loads should avoid it.
        retry_after_seconds: Time that the server asked to wait before a retry.
        cause: The likely cause.
        hint: What to do next.
    """

    default_retryable: ClassVar[bool] = False

    def __init__(
        self,
        reason: str,
        *,
        uri: str = "",
        operation: str = "",
        provider: str = "",
        retryable: bool | None = None,
        peer_at_fault: bool = False,
        retry_after_seconds: float | None = None,
        cause: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(reason, cause=cause, hint=hint)
        self.uri = uri
        self.operation = operation
        self.provider = provider
        self.retryable = self.default_retryable if retryable is None else retryable
        self.peer_at_fault = peer_at_fault
        self.retry_after_seconds = retry_after_seconds
        #: Number of attempts in all; the retry policy sets it when it gives up.
        self.attempts = 1

    @property
    def headline(self) -> str:
        """The operation, its object, the number of attempts, and what came back."""
        tried = f"could not {self.operation}" if self.operation else ""
        tried = " of ".join(part for part in (tried, self.uri) if part)
        attempts = f" after {self.attempts} attempts" if self.attempts > 1 else ""
        return f"{tried}{attempts}: {self.message}" if tried else self.message


class NotFoundError(BackendError):
    """The object, directory, bucket or host does not exist."""


class AccessDeniedError(BackendError):
    """Credentials are missing, wrong or expired, or do not allow this."""


class UnavailableError(BackendError):
    """The server has a temporary fault or cannot be reached, or the connection broke."""

    default_retryable = True


class StillArrivingError(UnavailableError):
    """The server does not have the bytes yet, and is getting them. Core waits for as long as more of them arrive.

    Args:
        reason: As in ``BackendError``.
        present_bytes: How many bytes of the model have arrived at the server so far.
        details: The other arguments of ``BackendError``.
    """

    def __init__(self, reason: str, *, present_bytes: int = 0, **details: Any) -> None:  # noqa: ANN401 - of BackendError
        super().__init__(reason, **details)
        self.present_bytes = present_bytes


class ThrottledError(UnavailableError):
    """The server receives too many requests (HTTP 429, or 503 with SlowDown). Concurrency is lowered."""


class DeadlineError(BackendError):
    """No answer came in time."""

    default_retryable = True


class IntegrityError(BackendError):
    """The bytes that arrived differ from those that were stored."""


class SourceChangedError(BackendError):
    """The object has another version than at the start of the load. Versions are never mixed."""


class UnsupportedError(BackendError):
    """The backend does not support the operation."""
