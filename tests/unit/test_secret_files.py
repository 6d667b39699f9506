"""Files with tokens and keys: the log warns of those that all users of the machine can read."""

from __future__ import annotations

from pathlib import Path

import pytest

from modelexpress_core.wire.files import read_bytes


@pytest.mark.parametrize(
    ("variable", "mode", "warned"),
    [
        ("MX_AUTH_TOKENS_PATH", 0o644, True),
        ("MX_AUTH_TOKEN_PATH", 0o604, True),
        ("MX_TLS_KEY_PATH", 0o444, True),
        ("MX_TLS_KEY_PATH", 0o640, False),
        ("MX_AUTH_TOKEN_PATH", 0o400, False),
        ("MX_TLS_CERT_PATH", 0o644, False),
        ("MX_TLS_CA_PATH", 0o644, False),
    ],
)
def test_secrets_that_all_users_can_read_earn_one_warning(
    variable: str, mode: int, warned: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With the file, its variable and what to do, and without its content. Groups are for those who may read it."""
    path = tmp_path / "file"
    path.write_bytes(b"swordfish")
    path.chmod(mode)

    contents = [read_bytes(str(path), variable) for _ in range(3)]

    assert [b"swordfish"] * 3 == contents
    assert warned == (len(caplog.records) == 1)
    assert warned == (f"all users of this machine can read {path}, which {variable} names: chmod o-r" in caplog.text)
    assert "swordfish" not in caplog.text
