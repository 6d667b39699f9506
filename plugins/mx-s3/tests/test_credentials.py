"""As whom requests are signed: every place that gives credentials, and a real load with what it gave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from devtools.seaweedfs import SeaweedFS
from modelexpress_core.errors import AccessDeniedError
from mx_s3._storage import S3Storage

NO_KEYS = {"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}


def test_credentials_from_variables(opened: Callable[..., S3Storage], server: SeaweedFS) -> None:
    """The end of the key is shown, and no more of it."""
    key = server.environ()["AWS_ACCESS_KEY_ID"]

    said = opened().credentials()

    assert f"access key ...{key[-4:]}, from AWS_ACCESS_KEY_ID (explicit)" == said


def test_credentials_of_a_profile(opened: Callable[..., S3Storage], tmp_path: Path) -> None:
    """The profile and the file are named."""
    file = tmp_path / "credentials"
    file.write_text("[serving]\naws_access_key_id = AKIDEXAMPLE\naws_secret_access_key = s3cret\n")

    said = opened(AWS_PROFILE="serving", AWS_SHARED_CREDENTIALS_FILE=str(file), **NO_KEYS).credentials()

    assert "access key ...MPLE, from the profile serving in the credentials file (shared-credentials-file)" == said


def test_nobodys_credentials(opened: Callable[..., S3Storage]) -> None:
    """Unsigned requests have no key."""
    assert "nobody: requests are not signed (MX_S3_ANONYMOUS)" == opened(MX_S3_ANONYMOUS="1").credentials()


def test_no_credentials(opened: Callable[..., S3Storage]) -> None:
    """Where there are none, that is an error with what to set."""
    storage = opened(**NO_KEYS)

    with pytest.raises(AccessDeniedError, match="could not find the credentials of s3://models: no credentials were"):
        storage.credentials()
