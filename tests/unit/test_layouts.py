"""The digest of a layout: equal for equal layouts, and for no others."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelexpress_core.sources.identity import WIRE_VERSION, Engine, SourceIdentity, own_identity
from modelexpress_core.sources.layouts import TensorLayout, layout_digest, tensor_layouts

#: Few characters, so that texts are often alike but for where they end, and those that JSON writes in a special way.
_TEXT = st.text(st.sampled_from('ab1,"[]\\ \ud83d\ude00\N{GRINNING FACE}'), max_size=5)
_SIZES = st.lists(st.integers(0, 12), max_size=3)
_LAYOUTS = st.builds(TensorLayout, name=_TEXT, shape=_SIZES, stride=_SIZES, dtype=_TEXT)
_LISTS = st.lists(_LAYOUTS, max_size=4)


@given(_LISTS, st.randoms())
def test_the_order_does_not_matter(tensors: list[TensorLayout], random: object) -> None:
    """Engines name their tensors in any order."""
    shuffled = [*tensors]
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    assert layout_digest(tensors) == layout_digest(iter(shuffled))


@given(_LISTS, _LISTS)
def test_two_lists_have_one_digest_only_if_they_hold_the_same(a: list[TensorLayout], b: list[TensorLayout]) -> None:
    """Nothing that moves from a name to the next, or from a shape to a stride, goes unseen."""
    assert (sorted(a) == sorted(b)) == (layout_digest(a) == layout_digest(b))


@given(_LISTS, _LAYOUTS, _LAYOUTS)
def test_every_field_counts(tensors: list[TensorLayout], one: TensorLayout, other: TensorLayout) -> None:
    """A change of one field of one tensor is another layout."""
    digest = layout_digest([*tensors, one])
    for name in attrs.fields_dict(TensorLayout):
        changed = attrs.evolve(one, **{name: getattr(other, name)})
        assert (changed == one) == (digest == layout_digest([*tensors, changed])), name


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([("ab", [1], [1], "f")], [("a", [1], [1], "bf")]),
        ([("a", [12], [1], "f")], [("a", [1, 2], [1], "f")]),
        ([("a", [1, 2], [], "f")], [("a", [1], [2], "f")]),
        ([("a", [], [], "f")], [("a", [], [], "f"), ("a", [], [], "f")]),
        ([('a",[],[],"f"],["b', [], [], "f")], [("a", [], [], "f"), ("b", [], [], "f")]),
        ([("\ud83d\ude00", [], [], "f")], [("\N{GRINNING FACE}", [], [], "f")]),
    ],
)
def test_tricks(a: list[tuple[str, list[int], list[int], str]], b: list[tuple[str, list[int], list[int], str]]) -> None:
    """Texts and lists that would be alike if they were written one after the other."""
    assert layout_digest(TensorLayout(*each) for each in a) != layout_digest(TensorLayout(*each) for each in b)


def test_a_digest_is_what_it_was() -> None:
    """Workers of two releases find one another; this value was computed once, with sha256sum."""
    tensors = {"w": torch.zeros(2, 3, dtype=torch.bfloat16).t(), "b": torch.zeros(3)}

    layouts = tensor_layouts(tensors)

    assert (
        TensorLayout("w", (3, 2), (1, 3), "bfloat16"),
        TensorLayout("b", (3,), (1,), "float32"),
    ) == layouts
    assert "679c2a5f87329f20" == layout_digest(layouts)


def test_an_identity_of_our_own() -> None:
    """It holds all that has to be the same, and the digest stands beside other parameters."""
    tensors = {"w": torch.zeros(2, 3)}

    identity = own_identity(
        "acme/model",
        tensors,
        engine=Engine.VLLM,
        engine_version="0.32",
        tensor_parallel_size=2,
        dtype="bfloat16",
        extra_parameters={"version": "7"},
    )

    expected = SourceIdentity(
        "acme/model",
        mx_version=WIRE_VERSION,
        backend_framework=Engine.VLLM,
        backend_framework_version="0.32",
        torch_version=torch.__version__,
        cuda_version=torch.version.cuda or torch.version.hip or "",
        gpu_arch="cpu",
        tensor_parallel_size=2,
        dtype="bfloat16",
        extra_parameters={"version": "7", "layout_signature": layout_digest(tensor_layouts(tensors))},
    )
    assert expected == identity
    transposed = own_identity("acme/model", {"w": tensors["w"].t()}, engine=Engine.VLLM, engine_version="0.32")
    straight = own_identity("acme/model", tensors, engine=Engine.VLLM, engine_version="0.32")
    assert transposed.source_id != straight.source_id
