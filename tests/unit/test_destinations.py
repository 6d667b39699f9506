"""``load_into``: modules and mappings as destinations, what fits, and what a failed load leaves behind."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn

import modelexpress_core as mx
from modelexpress_core import plugin as core
from modelexpress_core.hooks import hookimpl
from modelexpress_core.placement import DeferredTensor
from modelexpress_core.plugins import PluginManager
from modelexpress_core.storage.memory import store

_numbers = itertools.count()


def stored(tensors: Mapping[str, torch.Tensor]) -> str:
    name = f"destinations-{next(_numbers)}"
    store(name).put("model.safetensors", save({key: t.contiguous() for key, t in tensors.items()}))
    return f"memory://{name}"


def into(target: Any, uri: str, **options: Any) -> mx.LoadReport:
    return mx.load_into(target, uri, environ={}, **options)


def numbered(*shape: int, start: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.arange(start, start + torch.Size(shape).numel()).view(shape).to(dtype)


class Tied(nn.Module):
    """An embedding that is also the output layer, a buffer, and one that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("table", torch.ones(5), persistent=False)


def state(**others: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "embed.weight": numbered(6, 4),
        "norm.weight": numbered(4, start=50),
        "norm.bias": numbered(4, start=60),
        "steps": numbered(3, start=70, dtype=torch.int64),
        **others,
    }


# -- modules ----------------------------------------------------------------------------------------------------------


def test_a_module_is_loaded_in_place() -> None:
    """Parameters keep their memory, their ties and ``requires_grad``; the other buffer keeps its value."""
    module = Tied()
    address = module.embed.weight.data_ptr()

    report = into(module, stored(state()))

    assert all(torch.equal(t, module.state_dict()[name]) for name, t in state().items())
    assert address == module.embed.weight.data_ptr()
    assert module.head.weight is module.embed.weight
    assert module.embed.weight.requires_grad
    assert [1] * 5 == module.table.tolist()
    assert report.bytes_needed == sum(t.nbytes for t in state().values())


def test_either_name_of_a_tied_tensor_will_do_and_both_too() -> None:
    """Which of the names a checkpoint has does not matter."""
    whole = state()
    other = {"head.weight" if name == "embed.weight" else name: t for name, t in whole.items()}

    for tensors in (whole, other, {**whole, "head.weight": whole["embed.weight"].clone()}):
        module = Tied()
        into(module, stored(tensors))

        assert torch.equal(whole["embed.weight"], module.head.weight)


def test_a_module_on_the_meta_device_gets_memory() -> None:
    """Its parameters become real ones with the weights; ties, classes and ``requires_grad`` stay."""
    with torch.device("meta"):
        module = Tied()
    module.table = torch.ones(5)
    module.norm.weight.requires_grad_(False)

    into(module, stored(state()))

    assert all(torch.equal(t, module.state_dict()[name]) for name, t in state().items())
    assert module.head.weight is module.embed.weight
    assert nn.Parameter is type(module.embed.weight)
    assert (True, False) == (module.embed.weight.requires_grad, module.norm.weight.requires_grad)
    assert not any(t.is_meta for t in module.state_dict().values())


def test_a_module_of_which_a_part_is_on_the_meta_device_keeps_the_rest_in_place() -> None:
    """Real parameters are written where they are."""
    module = Tied()
    module.norm = nn.LayerNorm(4, device="meta")
    address = module.embed.weight.data_ptr()

    into(module, stored(state()))

    assert torch.equal(state()["norm.bias"], module.norm.bias)
    assert address == module.embed.weight.data_ptr()


def test_a_buffer_that_no_checkpoint_holds_cannot_be_on_the_meta_device() -> None:
    """Its values would be anything at all, so the load refuses before it begins, and says which."""
    with torch.device("meta"):
        module = Tied()

    with pytest.raises(
        mx.IncompleteLoadError, match="that no checkpoint holds are on the meta device: table"
    ) as caught:
        into(module, stored(state()))

    assert ("table",) == caught.value.missing


class Renamed(nn.Module):
    """Hands out a copy of its parameter, so that nothing can be read into it by that name."""

    def __init__(self, *, keep: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(4, device="meta"))
        self.keep = keep

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        return {"other": self.weight.detach().clone()} if self.keep else {}


@pytest.mark.parametrize("keep", [False, True])
def test_parameters_on_the_meta_device_that_no_name_leads_to_are_an_error(keep: bool) -> None:
    """A module that hides or copies its parameters in its state gets no memory that stays unfilled."""
    module = Renamed(keep=keep)

    with pytest.raises((mx.IncompleteLoadError, mx.PlacementError), match="on the meta device"):
        into(module, stored({"other": numbered(4)}), strict=False)

    assert module.weight.is_meta


@pytest.mark.parametrize(
    "tensors",
    [
        {"embed.weight": numbered(6, 5)},
        {"norm.bias": numbered(4, dtype=torch.int32)},
        {"unknown": numbered(1)},
    ],
)
def test_a_load_that_does_not_fit_leaves_a_meta_module_as_it_was(tensors: Mapping[str, torch.Tensor]) -> None:
    """No parameter got memory, none was replaced."""
    with torch.device("meta"):
        module = Tied()
    module.table = torch.ones(5)
    before = dict(module.named_parameters())

    with pytest.raises(mx.ModelExpressError):
        into(module, stored(state(**tensors)))

    assert all(parameter is before[name] for name, parameter in module.named_parameters())
    assert all(parameter.is_meta for parameter in module.parameters())


def test_a_load_whose_bytes_do_not_come_leaves_a_meta_module_as_it_was() -> None:
    """The object disappears between header and weights: the error comes out, and the module is untouched."""
    with torch.device("meta"):
        module = Tied()
    module.table = torch.ones(5)
    uri = stored(state())

    class Deleting:
        @hookimpl
        def mx_load_started(self) -> None:
            store(uri.removeprefix("memory://")).delete("model.safetensors")

    plugins = PluginManager()
    plugins.register(core, name="modelexpress-core")
    plugins.register(Deleting(), name="mx-deleting")

    with pytest.raises(mx.NotFoundError):
        into(module, uri, plugins=plugins)

    assert all(parameter.is_meta for parameter in module.parameters())


# -- mappings ---------------------------------------------------------------------------------------------------------


def test_a_mapping_is_filled_whatever_its_strides_and_classes() -> None:
    """Transposed, with gaps, parameters that require grad, tensors that share memory, views of numpy arrays."""
    weights = {
        "t": numbered(4, 6),
        "gaps": numbered(3, 4),
        "p": numbered(5),
        "a": numbered(2),
        "b": numbered(2, start=9),
    }
    buffer = torch.zeros(2 * 3 * 8)
    shared = torch.zeros(4)
    target = {
        "t": torch.zeros(6, 4).t(),
        "gaps": buffer.view(6, 8)[::2, 1::2],
        "p": nn.Parameter(torch.zeros(5)),
        "a": torch.from_numpy(shared.numpy()[:2]),
        "b": shared[2:],
    }

    report = into(target, stored(weights))

    assert all(torch.equal(weights[name], t) for name, t in target.items())
    assert [1, 2, 9, 10] == shared.tolist()
    assert weights["gaps"].sum() == buffer.sum()
    assert {} == report.materialised_operations


def test_destinations_that_are_no_plain_memory_are_filled_by_torch() -> None:
    """A conjugated view gets the values that it shows; an expanded one, which cannot hold them, is refused."""
    values = torch.tensor([1 + 2j, 3 - 4j])
    base = torch.zeros(2, dtype=torch.complex64)

    into({"z": base.conj()}, stored({"z": values}))

    assert torch.equal(values.conj(), base)
    with pytest.raises(mx.PlacementError, match="elements of the destination w share memory"):
        into({"w": torch.zeros(1).expand(4)}, stored({"w": numbered(4)}))


def test_mappings_need_memory() -> None:
    """A destination on the meta device is refused before anything is read, also as the device to load to."""
    with pytest.raises(mx.PlacementError, match="destinations on the meta device, which has no memory: w"):
        into({"w": torch.empty(4, device="meta")}, stored({"w": numbered(4)}))

    with torch.device("meta"):
        module = nn.Linear(2, 2)
    with pytest.raises(mx.PlacementError, match="on the meta device"):
        into(module, stored({"weight": numbered(2, 2), "bias": numbered(2)}), device="meta")
    with pytest.raises(mx.PlacementError, match="on the meta device"):
        mx.load_state_dict(stored({"w": numbered(4)}), device="meta", environ={})


def test_deferred_tensors_of_another_load_can_be_the_source_of_names_only() -> None:
    """Tensors that are made in a load are ordinary ones afterwards."""
    uri = stored({"w": numbered(4)})

    loaded = mx.load_state_dict(uri, environ={})

    assert not isinstance(loaded["w"], DeferredTensor)
    assert torch.equal(numbered(4), loaded["w"])


# -- what fits --------------------------------------------------------------------------------------------------------


def test_missing_and_unexpected_tensors_are_named() -> None:
    """Both lists in one error, with numbers, and on the error object."""
    uri = stored({"a": numbered(2), "x": numbered(2), "y": numbered(2)})

    with pytest.raises(mx.IncompleteLoadError) as caught:
        into({"a": torch.zeros(2), "b": torch.zeros(2)}, uri)

    assert (("b",), ("x", "y")) == (caught.value.missing, caught.value.unexpected)
    assert "1 tensors are not in the checkpoint: b; 2 tensors have no destination: x, y" in str(caught.value)


def test_tensors_without_a_destination_can_be_left_out() -> None:
    """``strict=False`` lets unexpected ones be, and never missing ones."""
    uri = stored({"a": numbered(2), "x": numbered(2)})
    target = {"a": torch.zeros(2)}

    report = into(target, uri, strict=False)

    assert [1, 2] == target["a"].tolist()
    assert (1, 8) == (report.tensors, report.bytes_needed)
    with pytest.raises(mx.IncompleteLoadError, match="1 tensors are not in the checkpoint: b"):
        into({**target, "b": torch.zeros(2)}, uri, strict=False)


def test_long_lists_of_names_are_cut_short() -> None:
    """Eight names and the number of the others."""
    uri = stored({"a": numbered(1)})

    with pytest.raises(mx.IncompleteLoadError, match="b0, b1, b2, b3, b4, b5, b6, b7 and 12 more") as caught:
        into({"a": torch.zeros(1)} | {f"b{i}": torch.zeros(1) for i in range(20)}, uri)

    assert 20 == len(caught.value.missing)


def test_another_shape_is_an_error_that_shows_both() -> None:
    """Also where the number of elements is the same, or one could be broadcast to the other."""
    uri = stored({"w": numbered(2, 3)})

    for shape in ((3, 2), (6,), (4, 2, 3), (2, 4)):
        target = torch.zeros(shape)

        with pytest.raises(mx.PlacementError) as caught:
            into({"w": target}, uri)

        assert f"w is [2, 3] in model.safetensors and {list(shape)} here" in str(caught.value)
        assert "w" == caught.value.tensor
        assert not target.any()


def test_another_dtype_is_an_error_unless_it_is_to_be_cast() -> None:
    """The message shows both and names the way out; ``cast`` converts as torch does."""
    values = numbered(3, 4, dtype=torch.bfloat16) / 3
    uri = stored({"w": values})
    wide, transposed = torch.zeros(3, 4), torch.zeros(4, 3, dtype=torch.float16)

    with pytest.raises(mx.PlacementError, match=r"w is BF16 in model.safetensors and torch.float32 here") as caught:
        into({"w": wide}, uri)
    into({"w": wide}, uri, cast=True)
    into({"w": transposed.t()}, uri, cast=True)

    assert "pass cast=True" in str(caught.value)
    assert torch.equal(values.float(), wide)
    assert torch.equal(values.half(), transposed.t())


def test_nothing_is_written_where_one_of_many_does_not_fit() -> None:
    """All destinations are checked before a byte is moved."""
    uri = stored({"a": numbered(2), "b": numbered(2), "c": numbered(3)})
    target = {"a": torch.zeros(2), "b": torch.zeros(2), "c": torch.zeros(2)}

    with pytest.raises(mx.PlacementError, match="1 tensors have another shape"):
        into(target, uri)

    assert not any(t.any() for t in target.values())


def test_scalars_and_tensors_without_elements_are_loaded() -> None:
    """Shapes [] and [0, 3] are treated like others, even though an empty tensor has no memory to compare."""
    uri = stored({"scalar": torch.tensor(7.0), "none": torch.zeros(0, 3)})
    target = {"scalar": torch.zeros(()), "none": torch.ones(0, 3)}

    report = into(target, uri)

    assert 7 == target["scalar"].item()
    assert (2, 4) == (report.tensors, report.bytes_fetched)
    with pytest.raises(mx.IncompleteLoadError, match="1 tensors are not in the checkpoint: other"):
        into({**target, "other": torch.zeros(0)}, uri)
