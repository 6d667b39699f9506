"""The S3 plugin: ``s3://bucket/key`` on AWS and on every server that speaks its protocol."""

from __future__ import annotations

__all__: list[str] = []
