"""URI schemes that first-party packages handle, and how to install them. Only messages use this data."""

from __future__ import annotations

from collections.abc import Mapping

from attrs import frozen

__all__ = ["KNOWN_SCHEMES", "SYNONYMS", "KnownScheme"]


@frozen
class KnownScheme:
    """A scheme of a first-party package.

    Attributes:
        distribution: The package that handles it.
        extra: The extra of modelexpress-core that installs the package; empty for core itself.
    """

    distribution: str
    extra: str

    @property
    def install_hint(self) -> str | None:
        """Argument of ``pip install``; None if there is nothing to install."""
        return f"modelexpress-core[{self.extra}]" if self.extra else None


KNOWN_SCHEMES: Mapping[str, KnownScheme] = {
    "file": KnownScheme("modelexpress-core", ""),
    "memory": KnownScheme("modelexpress-core", ""),
    "inproc": KnownScheme("modelexpress-core", ""),
    "s3": KnownScheme("mx-s3", "s3"),
    "gs": KnownScheme("mx-gcs", "gcs"),
    "az": KnownScheme("mx-azure", "azure"),
    "hf": KnownScheme("mx-hf", "hf"),
    "grpc": KnownScheme("mx-grpc-stream", "grpc"),
    "mx": KnownScheme("mx-grpc-stream", "grpc"),
    "mxs": KnownScheme("mx-grpc-stream", "grpc"),
    "kubernetes": KnownScheme("mx-kubernetes", "kubernetes"),
    "nixl": KnownScheme("mx-nixl", "nixl"),
}

#: Schemes of other tools, and our schemes for the same storages.
SYNONYMS: Mapping[str, str] = {
    "s3a": "s3",
    "s3n": "s3",
    "gcs": "gs",
    "azure": "az",
    "abfs": "az",
    "abfss": "az",
    "huggingface": "hf",
    "mem": "memory",
    "local": "file",
}
