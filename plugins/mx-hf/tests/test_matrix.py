"""Every kind of token in every condition: what a load of a file sees, and what the doctor says of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

import modelexpress_core as mx
from devtools.credential_matrices import HF
from devtools.fake_hub import FakeHub, HubAnswer, HubRequest
from modelexpress_core.doctor import diagnose
from modelexpress_core.errors import AccessDeniedError, BackendError, NotFoundError
from mx_hf._storage import HfStorage

TOKEN = "hf_aVeryGoodTokenForTheTests"
OTHER = "hf_anotherTokenForTheTests"
WEIGHTS = {"weight": torch.arange(4.0)}

#: Conditions that a doctor, who looks at one moment, has too.
_LASTING = [case for case in HF.cases(doctor=True) if ", and" not in case[1]]


@pytest.fixture
def prepared(hub: FakeHub, tmp_path: Path) -> Callable[[str, str], dict[str, str]]:
    """Variables for a kind of token, in a condition; the repository is made so that the condition matters."""
    hub.put("org/model", "model.safetensors", save(WEIGHTS))
    repository = hub.repositories["org/model"]

    def given(kind: str, token: str) -> dict[str, str]:
        if kind == "token":
            return {"HF_TOKEN": token}
        (tmp_path / "token").write_text(token)
        return {"HF_TOKEN_PATH": str(tmp_path / "token")}

    def prepared(kind: str, condition: str) -> dict[str, str]:
        repository.gated = condition in {"missing", "may not read"}
        repository.private = condition == "may not list"
        if kind == "no token":
            return {**hub.environ(), "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}
        if condition == "missing":
            return {**hub.environ(), "HF_TOKEN_PATH": str(tmp_path / "none")}
        if condition in {"valid", *(name for _, name in HF.cases() if ", and" in name)}:
            repository.private = True
            repository.readers |= {TOKEN, OTHER}
        if condition.startswith("expired"):
            later = OTHER if condition.endswith("renewed") else TOKEN
            hub.before = _expires(hub, lambda: given(kind, later))
        return {**hub.environ(), **given(kind, "hf_unknown" if condition == "wrong" else TOKEN)}

    return prepared


def _expires(hub: FakeHub, renew: Callable[[], object]) -> Callable[[HubRequest], HubAnswer | None]:
    """Once the first bytes were read, the token and all signed URLs run out; another token may be there by then."""
    read: list[HubRequest] = []

    def before(request: HubRequest) -> None:
        if request.server == "cdn":
            read.append(request)
            if len(read) == 2:
                hub.tokens.clear()
                hub.tokens.add(OTHER)
                hub.revoke_signatures()
                renew()

    return before


def _loaded(storage: HfStorage) -> Iterator[bytes]:
    (info,) = [each for each in storage.list("model") if each.path.endswith(".safetensors")]
    for offset in (0, 8):
        buffer = bytearray(8)
        storage.read_into(info.path, offset, memoryview(buffer), version=info.version)
        yield bytes(buffer)


@pytest.mark.parametrize(("kind", "condition"), HF.cases())
def test_what_a_load_sees(
    kind: str,
    condition: str,
    hub: FakeHub,
    prepared: Callable[[str, str], dict[str, str]],
    opened: Callable[..., HfStorage],
) -> None:
    """The file's bytes, or one final error with cause and next step, and without a token."""
    storage = opened(**prepared(kind, condition))
    expected = HF.kind(kind).outcomes[condition]
    error, content = None, []

    try:
        content = list(_loaded(storage))
    except (AccessDeniedError, NotFoundError) as exc:
        error = exc

    assert expected.checked_by == ("stand-in" if hub.requests else "no server")
    if not expected.cause:
        assert error is None, error
        assert save(WEIGHTS)[:16] == b"".join(content)
        return
    assert error is not None
    assert expected.cause == error.cause, error
    assert error.hint
    assert not error.retryable
    assert TOKEN not in f"{error} {error.hint}"


@pytest.mark.parametrize(("kind", "condition"), _LASTING)
def test_the_doctor_says_the_same(kind: str, condition: str, prepared: Callable[[str, str], dict[str, str]]) -> None:
    """The step that fails has the cause of the error; those before it succeed."""
    environ = prepared(kind, condition)
    cause = HF.kind(kind).outcomes[condition].cause

    steps = {step.name: step for step in diagnose("hf://org/model", environ=environ, timeout_seconds=20.0)}

    assert ["ok"] * 2 == [steps[name].status for name in ("connection", "credentials")]
    assert [] == [step.name for step in steps.values() if TOKEN in f"{step.seen} {step.facts} {step.hint}"]
    if not cause:
        assert ["ok"] * 2 == [steps[name].status for name in ("listing", "read")]
        return
    failed = next(step for step in steps.values() if step.status == "failed")
    assert failed.name in {"listing", "read"}
    assert cause == failed.cause, failed
    assert failed.hint


@pytest.mark.parametrize(("kind", "condition"), _LASTING)
def test_a_checkpoint_ends_alike(kind: str, condition: str, prepared: Callable[[str, str], dict[str, str]]) -> None:
    """The error of a whole load has the same cause."""
    environ = prepared(kind, condition)
    cause = HF.kind(kind).outcomes[condition].cause

    if not cause:
        assert torch.equal(WEIGHTS["weight"], mx.load_state_dict("hf://org/model", environ=environ)["weight"])
        return
    with pytest.raises(BackendError) as caught:
        mx.load_state_dict("hf://org/model", environ=environ)
    assert cause == caught.value.cause, caught.value
