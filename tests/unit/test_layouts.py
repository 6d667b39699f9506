"""The digest of a layout: equal for equal layouts, and for no others."""

from __future__ import annotations

import attrs
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modelexpress_core.contracts.identity import WIRE_VERSION, Engine, SourceIdentity
from modelexpress_core.contracts.transport import TensorLayout
from modelexpress_core.sources.identity import own_identity
from modelexpress_core.transport.layouts import layout_digest, tensor_layouts

#: Few characters, so that texts are often alike but for where they end, and those that JSON writes in a special way.
_TEXT = st.text(st.sampled_from('ab1,"[]\\ \ud83d\ude00\N{GRINNING FACE}'), max_size=5)
_SIZES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=3)


def _layout(name: str, sizes: list[tuple[int, int]], dtype: str, same: str) -> TensorLayout:
    return TensorLayout(name, [size for size, _ in sizes], [step for _, step in sizes], dtype, same)


_LAYOUTS = st.builds(_layout, _TEXT, _SIZES, _TEXT, _TEXT)
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
    same = sorted(each.canonical for each in a) == sorted(each.canonical for each in b)
    assert same == (layout_digest(a) == layout_digest(b))


@given(_LISTS, _LAYOUTS, _LAYOUTS)
def test_every_field_counts(tensors: list[TensorLayout], one: TensorLayout, other: TensorLayout) -> None:
    """A change of one field of one tensor is another layout."""
    digest = layout_digest([*tensors, one])
    for names in (("name",), ("shape", "stride"), ("dtype",), ("same_memory_as",)):
        changed = attrs.evolve(one, **{name: getattr(other, name) for name in names})
        assert (changed.canonical == one.canonical) == (digest == layout_digest([*tensors, changed])), names


@pytest.mark.parametrize(
    ("shape", "stride", "other", "alike"),
    [
        ((1, 64), (64, 1), (1, 1), True),
        ((0, 3), (3, 1), (9, 9), True),
        ((2, 3), (3, 1), (1, 2), False),
    ],
)
def test_strides_along_which_nobody_steps_do_not_count(
    shape: tuple[int, ...], stride: tuple[int, ...], other: tuple[int, ...], alike: bool
) -> None:
    """Of one element, or of none: the bytes lie where they lay."""
    a, b = (layout_digest([TensorLayout("w", shape, each, "f")]) for each in (stride, other))

    assert alike == (a == b)


def test_tied_tensors_are_another_layout_than_equal_ones() -> None:
    """What is read into one of two tied tensors is read into both."""
    weight = torch.zeros(4, 2)

    tied = layout_digest(tensor_layouts({"a": weight, "b": weight}))
    equal = layout_digest(tensor_layouts({"a": weight, "b": weight.clone()}))

    assert tied != equal
    assert tied == layout_digest(tensor_layouts({"b": weight, "a": weight}))


def test_tensors_of_the_same_bytes_are_tied() -> None:
    """Whatever their shapes, the order of their dimensions and their dtypes."""
    weight = torch.zeros(4, 2, 3)
    same = {"t": weight.permute(2, 0, 1), "view": weight.view(8, 3), "bits": weight.view(torch.int16)}
    wide = torch.zeros(4, 6)[:, :3]

    tied = tensor_layouts({"a": weight, **same, "wide": wide, "wide t": wide.t()})

    owners = {layout.name: layout.same_memory_as for layout in tied}
    assert {"a": "", "t": "a", "view": "a", "bits": "a", "wide": "", "wide t": "wide"} == owners


def test_tensors_that_only_begin_at_the_same_byte_are_not_tied() -> None:
    """A read of one brings not all bytes of the other."""
    memory = torch.zeros(4, 6)

    found = tensor_layouts({"a": memory[:2], "b": memory, "c": memory[:, :3], "d": memory[0, 0], "e": memory[::2]})

    assert [""] * 5 == [layout.same_memory_as for layout in found]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ([("ab", [1], [1], "f")], [("a", [1], [1], "bf")]),
        ([("a", [12], [2], "f")], [("a", [1, 2], [2, 2], "f")]),
        ([("a", [2, 3], [4, 5], "f")], [("a", [2, 3, 4], [5, 5, 5], "f")]),
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
    assert "f338b7ed9f0cc739" == layout_digest(layouts)


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
