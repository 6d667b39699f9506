"""Every error that ModelExpress raises, and how its message is put together.

::

    ModelExpressError
    ├── SettingsError                 a variable or option has a value that cannot be used
    ├── PluginError                   a plugin cannot be used (.plugin names its distribution)
    │   ├── PluginLoadError           it does not import, or does not keep to the hook contract
    │   ├── PluginConflictError       two plugins claim one scheme and nothing settles it
    │   └── PluginApiError            it was built for another version of the hook contract
    ├── ResolveError                  a URI leads nowhere
    │   ├── InvalidURIError           it is not a URI
    │   └── UnknownSchemeError        no installed plugin handles its scheme
    ├── CheckpointError               the files are there, but are no valid checkpoint (.uri .file)
    ├── PlacementError                the destination does not fit the checkpoint (.tensor)
    ├── IncompleteLoadError           something that had to be written was not (.missing .unexpected)
    └── BackendError                  a storage or a peer failed (.uri .provider .retryable .peer_at_fault)
        ├── NotFoundError
        ├── AccessDeniedError
        ├── UnavailableError          a passing fault, unreachable, connection lost: trying again may help
        │   └── ThrottledError        it is asked too much: trying again helps later, and fewer at a time
        ├── DeadlineError             no answer in time
        ├── IntegrityError            the bytes are not the bytes that were stored
        ├── SourceChangedError        the object is no longer the version that the load began with
        └── UnsupportedError          the backend cannot do this

A backend classifies: it picks the class and says whether trying again can help.
Only ``modelexpress_core.fetch.retry`` acts on that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

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
    "SettingsError",
    "SourceChangedError",
    "ThrottledError",
    "UnavailableError",
    "UnknownSchemeError",
    "UnsupportedError",
]


class ModelExpressError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: What happened, naming the object and the operation.
        cause: The likely cause, where it is not plain from the message.
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
        return "\n".join(parts)

    @property
    def headline(self) -> str:
        """What happened, without cause and next step."""
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickle would call the class with the message alone, and engines hand errors from process to process.
        return _rebuilt, (type(self), self.args, self.__dict__)


def _sentence(text: str) -> str:
    return text if text.endswith((".", "?", "!")) else f"{text}."


def _rebuilt(cls: type[ModelExpressError], args: tuple[Any, ...], state: dict[str, Any]) -> ModelExpressError:
    error = cls.__new__(cls, *args)
    error.__dict__.update(state)
    return error


class SettingsError(ModelExpressError):
    """A variable or option has a value that cannot be used; all bad ones are named at once."""


class PluginError(ModelExpressError):
    """A plugin cannot be used.

    Args:
        message: What happened.
        plugin: Name of the distribution that is at fault.
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
    """A plugin does not import, or does not keep to the hook contract."""


class PluginConflictError(PluginError):
    """Two plugins claim one scheme, and no setting says which is meant."""


class PluginApiError(PluginError):
    """A plugin was built for another version of the hook contract."""


class ResolveError(ModelExpressError):
    """A URI leads nowhere."""


class InvalidURIError(ResolveError):
    """The text is not a URI that ModelExpress understands."""


class UnknownSchemeError(ResolveError):
    """No usable plugin handles the scheme of the URI."""


class CheckpointError(ModelExpressError):
    """The files were read, but they are no valid checkpoint.

    Args:
        message: What is wrong.
        uri: Redacted URI of the checkpoint.
        file: The file at fault, relative to the checkpoint.
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
    """A destination does not fit what the checkpoint holds.

    Args:
        message: What does not fit.
        tensor: Name of the tensor concerned.
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
    """A load ended without everything being where it belongs.

    Args:
        message: What is incomplete.
        missing: Names of the tensors that were not (or not wholly) written.
        unexpected: Names in the checkpoint that have no destination.
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


class BackendError(ModelExpressError):
    """A storage or a peer did not do what it was asked.

    Args:
        reason: What came back, without the URI (it is put in front).
        uri: Redacted URI of the object.
        operation: What was tried, as a verb phrase: ``"read bytes 0-99"``.
        provider: Name of the plugin that was asked.
        retryable: Whether the same request may succeed later; by default what the class says.
        peer_at_fault: Whether the other side is to blame, so that other loads should avoid it.
        retry_after_seconds: How long the other side asked to be left alone.
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
        #: How often the operation was tried in all; set by the retry policy when it gives up.
        self.attempts = 1

    @property
    def headline(self) -> str:
        """What was tried, of what, how often, and what came back."""
        tried = f"could not {self.operation}" if self.operation else ""
        tried = " of ".join(part for part in (tried, self.uri) if part)
        attempts = f" after {self.attempts} attempts" if self.attempts > 1 else ""
        return f"{tried}{attempts}: {self.message}" if tried else self.message


class NotFoundError(BackendError):
    """The object, directory, bucket or host does not exist."""


class AccessDeniedError(BackendError):
    """Credentials are missing, wrong, expired, or not allowed to do this."""


class UnavailableError(BackendError):
    """The other side has a passing fault or cannot be reached, or the connection broke."""

    default_retryable = True


class ThrottledError(UnavailableError):
    """The other side is asked too much (HTTP 429, or 503 with SlowDown); concurrency is lowered."""


class DeadlineError(BackendError):
    """No answer came in time."""

    default_retryable = True


class IntegrityError(BackendError):
    """The bytes that arrived are not the bytes that were stored."""


class SourceChangedError(BackendError):
    """The object is no longer the version that the load began with; versions are never mixed."""


class UnsupportedError(BackendError):
    """The backend cannot do what was asked."""
