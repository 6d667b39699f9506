"""Read grants: only what the server signed for this worker, and for now, names a reader."""

from __future__ import annotations

import asyncio

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelexpress_core.contracts.authenticator import Call, Refusal, RefusedError
from modelexpress_core.wire.grants import GRANT_SECONDS, GrantAuthenticator, ReadGrant, new_grant_key, sign_grant

_NOW_MS = 1_800_000_000_000
_KEY = bytes(range(32))
_GRANT = ReadGrant("alice", "5a5f555570065064", "w-1", _NOW_MS + GRANT_SECONDS * 1000)


def authenticator(*keys: bytes, required: bool = True) -> GrantAuthenticator:
    verifier = GrantAuthenticator("5a5f555570065064", "w-1", required=required, clock=lambda: 7.0)
    verifier.accept_server_time(_NOW_MS)
    for key in keys:
        verifier.accept_key(key)
    return verifier


def reader(verifier: GrantAuthenticator, token: str | None) -> str:
    return asyncio.run(verifier.authenticate(Call(token)))


def refusal(verifier: GrantAuthenticator, token: str | None) -> Refusal:
    with pytest.raises(RefusedError) as refused:
        reader(verifier, token)
    return refused.value.refusal


def test_a_grant_names_its_reader() -> None:
    """Whatever characters its names have."""
    named = attrs.evolve(_GRANT, reader="spiffe://é/alice")

    assert reader(authenticator(_KEY), sign_grant(named, _KEY)) == "spiffe://é/alice"


def test_the_key_before_the_present_one_still_verifies() -> None:
    """A worker that is published again gets a new key, while grants of the former one are on the way."""
    first, second, third = new_grant_key(), new_grant_key(), new_grant_key()
    verifier = authenticator(first, second, third)

    assert reader(verifier, sign_grant(_GRANT, third)) == "alice"
    assert reader(verifier, sign_grant(_GRANT, second)) == "alice"
    assert refusal(verifier, sign_grant(_GRANT, first)) is Refusal.UNAUTHENTICATED


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"source_id": "another"}, Refusal.PERMISSION_DENIED),
        ({"worker_id": "w-2"}, Refusal.PERMISSION_DENIED),
        ({"expires_at_ms": _NOW_MS}, Refusal.UNAUTHENTICATED),
        ({"expires_at_ms": _NOW_MS - 1}, Refusal.UNAUTHENTICATED),
        ({"expires_at_ms": _NOW_MS + 2 * GRANT_SECONDS * 1000}, Refusal.UNAUTHENTICATED),
        ({"expires_at_ms": 2**63 - 1}, Refusal.UNAUTHENTICATED),
    ],
)
def test_a_grant_for_something_else_is_refused(changes: dict[str, str | int], expected: Refusal) -> None:
    """Another source or worker, the past, and more time than the server gives."""
    signed = sign_grant(attrs.evolve(_GRANT, **changes), _KEY)  # type: ignore[arg-type]  # fields

    assert refusal(authenticator(_KEY), signed) is expected


def test_the_clock_of_the_worker_does_not_matter() -> None:
    """Grants expire by the time that the server told."""
    verifier = authenticator(_KEY)
    verifier.accept_server_time(_NOW_MS - 10 * 86_400_000)
    early = attrs.evolve(_GRANT, expires_at_ms=_NOW_MS - 10 * 86_400_000 + 1000)

    assert reader(verifier, sign_grant(early, _KEY)) == "alice"
    assert refusal(verifier, sign_grant(_GRANT, _KEY)) is Refusal.UNAUTHENTICATED


def test_without_a_key() -> None:
    """A worker that wants grants answers nobody; one whose server authenticates nobody answers everybody."""
    assert refusal(authenticator(), sign_grant(_GRANT, _KEY)) is Refusal.UNAVAILABLE
    assert reader(authenticator(required=False), None) == "anonymous"
    assert refusal(authenticator(_KEY, required=False), None) is Refusal.UNAUTHENTICATED
    assert refusal(authenticator(b""), None) is Refusal.UNAVAILABLE  # an empty key is none


@given(st.one_of(st.text(max_size=200), st.binary(max_size=200).map(lambda data: data.decode("latin-1"))))
def test_any_text_is_refused(text: str) -> None:
    """Without an exception of another kind."""
    assert refusal(authenticator(_KEY), text) is Refusal.UNAUTHENTICATED


@given(st.data())
def test_a_changed_grant_is_refused(data: st.DataObject) -> None:
    """Whichever character is changed, removed or added."""
    signed = sign_grant(_GRANT, _KEY)
    place = data.draw(st.integers(0, len(signed) - 1))
    character = data.draw(st.characters(min_codepoint=33, max_codepoint=126))
    changed = data.draw(
        st.sampled_from(
            [
                signed[:place] + character + signed[place + 1 :],
                signed[:place] + signed[place + 1 :],
                signed[:place] + character + signed[place:],
            ]
        )
    )

    if changed != signed:
        assert refusal(authenticator(_KEY), changed) is Refusal.UNAUTHENTICATED


def test_a_very_long_text_is_refused() -> None:
    """Without decoding it."""
    assert refusal(authenticator(_KEY), "A" * (1 << 20) + "." + "A" * 43) is Refusal.UNAUTHENTICATED
