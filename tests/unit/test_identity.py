"""The id of a source, which all programs that speak the protocol have to derive alike."""

from __future__ import annotations

import hashlib

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modelexpress_core.contracts.identity import WIRE_VERSION, Engine, SourceIdentity, SourceType
from modelexpress_core.wire.identities import identity_from_message, identity_to_message
from modelexpress_core.wire.proto.modelexpress import p2p_pb2

_DEEPSEEK = SourceIdentity(
    "deepseek-ai/DeepSeek-V3",
    mx_version="0.5.0",
    backend_framework=Engine.VLLM,
    tensor_parallel_size=8,
    dtype="bfloat16",
)

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_IDENTITIES = st.builds(
    SourceIdentity,
    model_name=_TEXT,
    mx_version=_TEXT,
    mx_source_type=st.integers(0, 20),
    backend_framework=st.integers(0, 20),
    tensor_parallel_size=st.integers(0, 2**32 - 1),
    pipeline_parallel_size=st.integers(0, 2**32 - 1),
    expert_parallel_size=st.integers(0, 2**32 - 1),
    dtype=_TEXT,
    quantization=_TEXT,
    extra_parameters=st.dictionaries(_TEXT, _TEXT, max_size=4),
    revision=_TEXT,
    backend_framework_version=_TEXT,
    torch_version=_TEXT,
    cuda_version=_TEXT,
    triton_version=_TEXT,
    gpu_arch=_TEXT,
    compile_config_digest=_TEXT,
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "5a5f555570065064"),
        ({"revision": "abc123def4567890"}, "d0c184b2a9a34c82"),
        ({"extra_parameters": {"Foo": "a", "foo": "b"}}, "bf71fb9340cd940a"),
    ],
)
def test_the_vectors_of_the_protocol(changes: dict[str, object], expected: str) -> None:
    """Ids that other programs computed."""
    assert expected == attrs.evolve(_DEEPSEEK, **changes).source_id  # type: ignore[arg-type]  # fields


def test_what_is_hashed() -> None:
    """Compact JSON with sorted keys; what is empty and optional is left out, and what is not ASCII stands as it is."""
    identity = attrs.evolve(
        _DEEPSEEK, model_name='Modèle "Ü"\n', gpu_arch="SM_90", extra_parameters={"B": "Ä", "a": ""}
    )
    text = (
        '{"backend_framework":1,"dtype":"bfloat16","expert_parallel_size":0,"extra_parameters":{"a":"","b":"ä"},'
        '"gpu_arch":"sm_90","model_name":"modèle \\"ü\\"\\n","mx_source_type":0,"mx_version":"0.5.0",'
        '"pipeline_parallel_size":1,"quantization":"","revision":"","tensor_parallel_size":8}'
    )

    assert hashlib.sha256(text.encode()).hexdigest()[:16] == identity.source_id


@given(_IDENTITIES)
def test_case_makes_no_difference(identity: SourceIdentity) -> None:
    """Of any text, keys of parameters included."""
    texts = {name: value.lower() for name, value in attrs.asdict(identity).items() if isinstance(value, str)}
    lowered: dict[str, str] = {}
    for key in sorted(identity.extra_parameters):
        lowered.setdefault(key.lower(), identity.extra_parameters[key].lower())

    changed = attrs.evolve(identity, **texts, extra_parameters=lowered)

    assert identity.source_id == changed.source_id


@given(_IDENTITIES, st.randoms())
def test_order_makes_no_difference(identity: SourceIdentity, random: object) -> None:
    """Parameters are a mapping."""
    items = list(identity.extra_parameters.items())
    random.shuffle(items)  # type: ignore[attr-defined]  # hypothesis' Random

    assert identity.source_id == attrs.evolve(identity, extra_parameters=dict(items)).source_id


@given(_IDENTITIES, st.sampled_from([field.name for field in attrs.fields(SourceIdentity)]))
def test_every_field_makes_a_difference(identity: SourceIdentity, name: str) -> None:
    """Two sources that differ in any of them are not interchangeable."""
    value = getattr(identity, name)
    if name == "extra_parameters":
        changed: object = {**value, "another key": "x"}
    else:
        changed = value + (1 if isinstance(value, int) and value < 2**32 - 1 else -1 if isinstance(value, int) else "x")

    assert identity.source_id != attrs.evolve(identity, **{name: changed}).source_id


@given(_IDENTITIES, _IDENTITIES, st.sampled_from([field.name for field in attrs.fields(SourceIdentity)]))
def test_ids_differ_if_and_only_if_a_field_does(one: SourceIdentity, other: SourceIdentity, name: str) -> None:
    """Explanations name the fields; two that differ in nothing, in one field, and in many."""
    for second in (one, attrs.evolve(one, **{name: getattr(other, name)}), other):
        assert bool(one.differences(second)) is (one.source_id != second.source_id)
        assert one.differences(second) == {key: (here, there) for key, (there, here) in second.differences(one).items()}


def test_differences_have_the_names_of_their_fields() -> None:
    """Those of further parameters have their own, also if a field has the same one."""
    one = SourceIdentity("acme/model", dtype="bfloat16", extra_parameters={"content_version": "1", "dtype": "x"})
    other = SourceIdentity("ACME/Model", dtype="float16", extra_parameters={"content_version": "2"})

    assert {
        "dtype": ("bfloat16", "float16"),
        "content_version": ("1", "2"),
        "dtype (extra)": ("x", ""),
    } == one.differences(other)


@given(_IDENTITIES)
def test_a_message_holds_all_of_it(identity: SourceIdentity) -> None:
    """There and back, over the wire."""
    message = p2p_pb2.SourceIdentity.FromString(identity_to_message(identity).SerializeToString())

    assert identity == identity_from_message(message)
    assert identity.extra_parameters == identity_from_message(message).extra_parameters


def test_ours_carry_the_version_of_the_protocol() -> None:
    """Not that of the package: workers of two releases find one another while a fleet is upgraded."""
    assert WIRE_VERSION == SourceIdentity("model").mx_version


def test_numbers_are_those_of_the_protocol() -> None:
    """The enumerations here have the members of those in the messages."""
    assert {f"BACKEND_FRAMEWORK_{each.name}": each.value for each in Engine} == dict(p2p_pb2.BackendFramework.items())
    assert {f"SOURCE_TYPE_{each.name}": each.value for each in SourceType} == dict(p2p_pb2.SourceType.items())
