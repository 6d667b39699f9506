"""The bytes of tensors: their memory where it has no gaps, and the same order for every layout."""

from __future__ import annotations

import pytest
import torch

from modelexpress_core.errors import PlacementError
from modelexpress_core.transport.tensor_bytes import bytes_of

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8, torch.bool, torch.complex64, torch.float64]


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = 1
    for size in shape:
        count *= size
    return torch.arange(count).remainder(100).to(dtype).reshape(shape)


def raw(tensor: torch.Tensor) -> list[int]:
    values: list[int] = tensor.contiguous().reshape(-1).view(torch.uint8).tolist()
    return values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 4), (0,), (4, 0)], ids=str)
def test_a_tensor_without_gaps_is_its_memory(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Writing to the bytes writes to the tensor."""
    tensor = numbered(*shape, dtype=dtype)
    found = bytes_of("weight", tensor)

    assert found.memory is not None
    assert tensor.nbytes == found.nbytes == len(found.memory)
    assert raw(tensor) == found.memory.tolist()
    assert not tensor.numel() or tensor.data_ptr() == found.memory.data_ptr()


@pytest.mark.parametrize(
    ("view", "same_memory"),
    [
        (lambda base: base.t(), True),
        (lambda base: base.unsqueeze(1).permute(2, 1, 0), True),
        (lambda base: base[2:5], True),
        (lambda base: base[:, 1:3], False),
        (lambda base: base[::2], False),
        (lambda base: base[:, 1:3].t(), False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_bytes_of_a_view_are_those_of_its_elements(view: object, same_memory: bool, dtype: torch.dtype) -> None:
    """In the order of its memory; what lies between the elements stays as it is."""
    assert callable(view)
    source, destination = numbered(6, 8, dtype=dtype), torch.zeros(6, 8, dtype=dtype)
    there, here = bytes_of("weight", view(source)), bytes_of("weight", view(destination))

    assert same_memory is (there.memory is not None)
    here.scatter(there.gathered())

    expected = torch.zeros(6, 8, dtype=dtype)
    view(expected).copy_(view(source))
    assert torch.equal(expected, destination)
    assert view(source).nbytes == there.nbytes


def test_bytes_that_begin_anywhere_can_be_scattered() -> None:
    """A buffer of bytes is not aligned as the elements are."""
    source, destination = numbered(6, 8), torch.zeros(6, 8)
    content = bytes_of("weight", source[:, 1:3]).gathered()
    shifted = torch.zeros(len(content) + 1, dtype=torch.uint8)
    shifted[1:] = content

    bytes_of("weight", destination[:, 1:3]).scatter(shifted[1:])

    assert torch.equal(source[:, 1:3], destination[:, 1:3])


def test_elements_that_a_tensor_repeats_count_once() -> None:
    """A stride of 0 has no memory of its own."""
    found = bytes_of("weight", torch.arange(3.0).unsqueeze(1).expand(3, 1000))

    assert 12 == found.nbytes
    assert found.memory is not None


def test_a_parameter_can_be_written() -> None:
    """Also one that wants a gradient."""
    parameter = torch.nn.Parameter(torch.zeros(4))

    bytes_of("weight", parameter).scatter(bytes_of("weight", torch.ones(4)).gathered())

    assert torch.equal(torch.ones(4), parameter.detach())


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.ones(3).to_sparse(), "not a dense tensor"),
        (torch.ones(3, dtype=torch.complex64).conj(), "not a dense tensor"),
        (torch.ones(3, device="meta"), "meta device"),
        (torch.ones(9).as_strided((4, 4), (1, 1)), "share memory in part"),
    ],
)
def test_tensors_that_have_no_bytes_of_their_own_are_refused(tensor: torch.Tensor, says: str) -> None:
    """With the name, and what to do."""
    with pytest.raises(PlacementError, match=says) as caught:
        bytes_of("layers.0.weight", tensor)

    assert "layers.0.weight" in str(caught.value)
    assert caught.value.hint
