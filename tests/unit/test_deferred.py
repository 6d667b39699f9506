"""What code can do with deferred tensors while a load records, rule by rule."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import io
import itertools
import pickle
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import modelexpress_core as mx
from modelexpress_core.hooks import hookimpl
from modelexpress_core.placement import DeferredTensor, pending_copies
from modelexpress_core.placement.interception import OperationInterceptor
from modelexpress_core.placement.pending_copies import CopyLimits, PendingCopies
from modelexpress_core.placement.pending_memory import PendingMemory
from modelexpress_core.placement.plan import ReadPlanner
from modelexpress_core.providers import StorageCapabilities, StorageProvider
from modelexpress_core.storage.memory import MemoryStorage, store
from modelexpress_core.uri import ModelURI

pytestmark = pytest.mark.usefixtures("no_grad")

_numbers = itertools.count()


class Gated(MemoryStorage):
    """Weights are read only when the gate is open; those that are named wait a little longer."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._objects = store(name)._objects
        self.gate = threading.Event()
        self.gate.set()
        self.closed = False
        self.slow: dict[int, float] = {}
        self.faults: dict[int, Exception] = {}
        self.reads: list[tuple[int, int]] = []

    def read_into(self, path: str, offset: int, buffer: memoryview, *, version: str | None) -> int:
        if offset:  # the header is at 0
            self.reads.append((offset, len(buffer)))
            time.sleep(self.slow.get(offset, 0))
            assert self.gate.wait(20) or self.closed, "the gate stayed closed"
            if offset in self.faults:
                raise self.faults[offset]
            if self.closed:
                raise mx.BackendError("closed")
        return super().read_into(path, offset, buffer, version=version)

    def close(self) -> None:
        self.closed = True
        self.gate.set()


class Plugin:
    def __init__(self, storage: Gated, request_cost_bytes: int) -> None:
        self.storage = storage
        self.request_cost_bytes = request_cost_bytes

    @hookimpl
    def mx_register_storages(self) -> list[StorageProvider]:
        def opened(_uri: ModelURI, _settings: Mapping[str, str]) -> Gated:
            return self.storage

        capabilities = StorageCapabilities(concurrency=4, request_cost_bytes=self.request_cost_bytes)
        return [StorageProvider("gated", ("gated",), opened, capabilities=capabilities)]


class Case:
    """A checkpoint behind a gate."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], request_cost_bytes: int) -> None:
        self.name = f"deferred-{next(_numbers)}"
        self.tensors = dict(tensors)
        store(self.name).put("model.safetensors", save(self.tensors))
        opened = mx.open_checkpoint(f"memory://{self.name}", environ={})
        self.offsets = {name: info.offset for name, info in opened.tensors.items()}
        self.storage = Gated(self.name)
        self.plugins = mx.PluginManager()
        self.plugins.register(Plugin(self.storage, request_cost_bytes), name="tests")

    def load(self, model: Any = None, **environ: str) -> mx.DeferredWeights:
        return mx.deferred_weights(f"gated://{self.name}", model=model, environ=environ, plugins=self.plugins)


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def case(request_cost_bytes: int = 0, **tensors: torch.Tensor) -> Case:
    return Case(tensors, request_cost_bytes)


def numbered(*shape: int, start: int = 1, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    count = int(np.prod(shape))
    return torch.arange(start, start + count).reshape(shape).to(dtype)


def address_bytes(address: int, length: int) -> bytes:
    return ctypes.string_at(address, length)


@contextlib.contextmanager
def ignoring_that_nothing_was_used() -> Iterator[None]:
    with contextlib.suppress(mx.IncompleteLoadError):
        yield


# -- views ------------------------------------------------------------------------------------------------------------


def test_views_read_nothing() -> None:
    """Any chain of views is deferred itself, and no read is sent for it."""
    c = case(w=numbered(8, 6), z=torch.zeros(1))

    with ignoring_that_nothing_was_used(), c.load() as weights:
        w = dict(weights)["w"]
        views = [
            w.narrow(0, 2, 3),
            w[1:7:2, ::3],
            w.t(),
            w.view(4, 12).chunk(2, dim=1)[1],
            w.unflatten(0, (2, -1)).permute(2, 0, 1),
            w.select(0, 1).unsqueeze(0).expand(5, -1),
            w.view(torch.uint8)[:, 4:8],
            w.diagonal(1),
            w.unfold(0, 2, 3),
            w.as_strided((2, 2), (1, 7), 3),
            w.detach().data,
            w.unbind(1)[2],
            *w.split([3, 5]),
        ]

    assert {DeferredTensor} == {type(view) for view in views}
    assert [] == c.storage.reads


def test_a_view_out_of_bounds_is_refused_as_torch_does() -> None:
    """``as_strided`` beyond the stored bytes raises where it is called, and a load that goes on is not harmed."""
    c = case(w=numbered(4, 4), after=numbered(4, 4))
    destination = torch.zeros(4, 4)

    with c.load() as weights:
        w = dict(weights)["w"]
        with pytest.raises(RuntimeError, match="out of bounds"):
            w.as_strided((5, 4), (4, 1))
        with pytest.raises(RuntimeError, match="out of bounds"):
            w.as_strided((4, 4), (4, 1), 1)
        inside = w.as_strided((0, 9), (99, 99))
        destination.copy_(w.as_strided((4, 4), (1, 4)))

    assert (0, 9) == inside.shape
    assert torch.equal(c.tensors["w"].t(), destination)


@pytest.mark.slow
def test_views_of_what_torch_reads_otherwise_than_it_is_stored_are_right() -> None:
    """Conjugated and negated views have the values that torch gives them, and writes through them reach the base."""
    c = case(w=torch.tensor([1 + 2j, 3 - 4j]))
    w = c.tensors["w"].clone()
    destination = torch.zeros(2, dtype=torch.complex64)

    with c.load() as weights:
        deferred = dict(weights)["w"]
        values = [deferred.conj().clone(), deferred.conj().imag.clone(), deferred.conj().t().resolve_conj().clone()]
        destination.copy_(deferred.conj())
        deferred.conj().imag.mul_(2)
        after = deferred.clone()

    expected = [w.conj().clone(), w.conj().imag.clone(), w.conj().t().resolve_conj().clone()]
    w.conj().imag.mul_(2)
    assert all(itertools.starmap(torch.equal, zip(expected, values, strict=True)))
    assert torch.equal(c.tensors["w"].conj(), destination)
    assert torch.equal(w, after)


@pytest.mark.parametrize("inference", [False, True])
def test_conversions_that_change_nothing_stay_views(inference: bool) -> None:
    """``to``, ``contiguous`` and the like return the tensor itself, also where inference mode hands them over whole."""
    c = case(w=numbered(4, 6))
    destination = torch.zeros(4, 3)

    with torch.inference_mode(inference), c.load() as weights:
        w = dict(weights)["w"]
        same = w.to("cpu").to(torch.float32).contiguous().type_as(w).expand_as(w).reshape(4, 6).cpu().float()
        destination = torch.zeros(4, 3)
        destination.copy_(same.narrow(1, 3, 3))

    assert torch.equal(c.tensors["w"][:, 3:], destination)
    assert {} == weights.report.materialised_operations


def test_a_name_and_a_shape_are_shown_without_reading() -> None:
    """``repr`` and everything that asks for shapes, dtypes and devices cost no read."""
    c = case(w=numbered(4, 6))

    with ignoring_that_nothing_was_used(), c.load() as weights:
        w = dict(weights)["w"]
        shown = repr(w), f"{w}", w.shape, w.dtype, w.device.type, w.stride(), w.nbytes, w.is_contiguous(), w.is_meta
        like = torch.empty_like(w.t()), torch.zeros_like(w), w.new_empty(3), torch.full_like(w, 2)

    text = "DeferredTensor(w, shape=[4, 6], dtype=torch.float32)"
    assert (text, text, (4, 6), torch.float32, "cpu", (6, 1), 96, True, False) == shown
    assert {"cpu"} == {t.device.type for t in like}
    assert (1, 6) == like[0].stride()
    assert [] == c.storage.reads


# -- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 256])
@pytest.mark.parametrize("names", [("first", "second"), ("second", "first")])
def test_the_later_of_two_copies_to_the_same_memory_wins(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, str], at_once: int
) -> None:
    """A copy waits for an earlier one to memory that it overlaps, however late the bytes of that come."""
    monkeypatch.setattr(PendingCopies, "limits", CopyLimits(batch_copies=at_once))
    c = case(first=numbered(8), second=numbered(8, start=100))
    c.storage.slow[c.offsets[names[0]]] = 0.05
    buffer = torch.zeros(12)

    with c.load() as weights:
        w = dict(weights)
        buffer[:8].copy_(w[names[0]])
        buffer[4:].copy_(w[names[1]])

    assert [*c.tensors[names[0]][:4].tolist(), *c.tensors[names[1]].tolist()] == buffer.tolist()


def test_a_tensor_that_was_fetched_ahead_comes_after_the_copy_before_it() -> None:
    """Its bytes are there already, and still wait for those of an earlier copy to the same memory."""
    c = case(large=numbered(1000), small=numbered(2, start=5000))
    c.storage.slow[c.offsets["large"]] = 0.05
    destination = torch.zeros(1000)

    with c.load() as weights:
        w = dict(weights)
        destination.copy_(w["large"])
        destination[10:12].copy_(w["small"])

    assert [*range(1, 11), 5000, 5001, *range(13, 1001)] == destination.tolist()


def test_copies_to_memory_apart_do_not_wait_for_each_other() -> None:
    """Columns of one matrix, halves of one buffer: nothing waits while they are recorded."""
    c = case(a=numbered(4, 2), b=numbered(4, 2, start=50))
    c.storage.gate.clear()
    matrix, halves = torch.zeros(4, 4), torch.zeros(2, 4, 2)

    with c.load() as weights:
        w = dict(weights)
        matrix[:, :2].copy_(w["a"])
        matrix[:, 2:].copy_(w["b"])
        halves[0].copy_(w["a"])
        halves[1].copy_(w["b"])
        c.storage.gate.set()

    assert torch.equal(torch.cat([c.tensors["a"], c.tensors["b"]], dim=1), matrix)
    assert torch.equal(torch.stack([c.tensors["a"], c.tensors["b"]]), halves)


def test_arithmetic_in_place_comes_after_the_copy_and_before_the_next() -> None:
    """copy, multiply, copy elsewhere, add: each sees what was before it."""
    c = case(w=numbered(6), v=numbered(3, start=10))
    c.storage.slow[c.offsets["w"]] = 0.05
    buffer, view = torch.zeros(6), torch.zeros(6)

    with c.load() as weights:
        w = dict(weights)
        buffer.copy_(w["w"])
        buffer.mul_(2)
        buffer[3:].copy_(w["v"])
        buffer.add_(1)
        view.copy_(buffer)

    assert [3, 5, 7, 11, 12, 13] == buffer.tolist()
    assert torch.equal(buffer, view)


READS: Mapping[str, Callable[[torch.Tensor], Any]] = {
    "sum": lambda t: t.sum().item(),
    "item": lambda t: [t[i].item() for i in range(len(t))],
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy().tolist(),
    "asarray": lambda t: np.asarray(t).tolist(),
    "from_dlpack": lambda t: np.from_dlpack(t).tolist(),
    "data_ptr": lambda t: address_bytes(t.data_ptr(), t.nbytes),
    "untyped_storage": lambda t: bytes(t.untyped_storage()),
    "storage_of_a_neighbour": lambda t: bytes(t[:0].untyped_storage()),
    "deepcopy": lambda t: copy.deepcopy(t).tolist(),
    "pickle": lambda t: pickle.loads(pickle.dumps(t)).tolist(),
    "save": lambda t: torch.load(io.BytesIO(_saved(t))).tolist(),
    "repr": repr,
    "format": lambda t: f"{t[1]:.1f}",
    "list": lambda t: [float(x) for x in t],
    "apply_": lambda t: t.apply_(lambda x: x + 1).tolist(),
    "map_": lambda t: torch.zeros(len(t)).map_(t, lambda _, y: y).tolist(),
    "out": lambda t: torch.add(t, 1, out=torch.empty(len(t))).tolist(),
    "foreach": lambda t: torch._foreach_add([t], 1)[0].tolist(),
    "share_memory_": lambda t: t.clone().copy_(t).share_memory_().tolist(),
    "function": lambda t: nn.functional.softmax(t, dim=0).tolist(),
    "parameter": lambda t: nn.Parameter(t).sum().item(),
    "state_dict": lambda t: nn.ParameterList([t]).state_dict()["0"].tolist(),
}


def _saved(t: torch.Tensor) -> bytes:
    file = io.BytesIO()
    torch.save(t, file)
    return file.getvalue()


@pytest.mark.parametrize("read", READS)
def test_reading_what_was_just_loaded_gives_the_weights(read: str) -> None:
    """Every way to the values of a destination waits for them, those that go past torch's operations too."""
    c = case(w=numbered(6))
    c.storage.slow[c.offsets["w"]] = 0.03
    destination = torch.zeros(6)

    with c.load() as weights:
        destination.copy_(dict(weights)["w"])
        value = READS[read](destination)

    assert READS[read](c.tensors["w"].clone()) == value


@pytest.mark.parametrize("read", [read for read in READS if read != "repr"])  # which shows no values, by design
def test_reading_a_deferred_tensor_gives_the_weights(read: str) -> None:
    """Whatever is no view reads the bytes and goes on with a plain tensor."""
    c = case(w=numbered(6))

    with c.load() as weights:
        value = READS[read](dict(weights)["w"])

    assert READS[read](c.tensors["w"].clone()) == value


def test_reading_one_tensor_does_not_wait_for_others() -> None:
    """While the bytes of one destination are being fetched, code can compute with other tensors."""
    c = case(w=numbered(6))
    destination, other = torch.zeros(6), torch.ones(6)

    with c.load() as weights:
        c.storage.gate.clear()
        destination.copy_(dict(weights)["w"])
        total = other.mul_(2).sum().item()
        asked = torch.empty_like(destination).shape, torch.zeros_like(destination).sum().item()
        views = destination.view(2, 3).t()[1:].shape
        c.storage.gate.set()

    assert (12, ((6,), 0), (2, 2)) == (total, asked, views)
    assert torch.equal(c.tensors["w"], destination)


def test_moving_into_shared_memory_waits_for_all_of_the_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A storage that moves takes its bytes along, also those that belong to other tensors."""
    # So that the read is under way when the storage moves.
    monkeypatch.setattr(PendingCopies, "limits", CopyLimits(batch_copies=1))
    c = case(w=numbered(6))
    c.storage.slow[c.offsets["w"]] = 0.03
    buffer = torch.zeros(12)
    left, right = buffer[:6], buffer[6:]

    with c.load() as weights:
        left.copy_(dict(weights)["w"])
        right.share_memory_()

    assert torch.equal(c.tensors["w"], left)


def test_growing_a_storage_waits_for_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """``resize_`` of one tensor moves the bytes that are being fetched to another."""
    # So that the read is under way when the storage moves.
    monkeypatch.setattr(PendingCopies, "limits", CopyLimits(batch_copies=1))
    c = case(w=numbered(6))
    c.storage.slow[c.offsets["w"]] = 0.03
    buffer = torch.zeros(6)
    left, right = buffer[:6], buffer[6:]

    with c.load() as weights:
        left.copy_(dict(weights)["w"])
        right.resize_(100_000)

    assert torch.equal(c.tensors["w"], left)


def test_memory_shared_with_numpy_is_one_memory() -> None:
    """Tensors made of one array are known to overlap, by address."""
    c = case(first=numbered(8), second=numbered(4, start=100))
    c.storage.slow[c.offsets["first"]] = 0.03
    array = np.zeros(8, dtype=np.float32)

    with c.load() as weights:
        w = dict(weights)
        torch.from_numpy(array).copy_(w["first"])
        torch.from_numpy(array[2:6]).copy_(w["second"])
        total = torch.from_numpy(array).sum().item()

    assert [1, 2, 100, 101, 102, 103, 7, 8] == array.tolist()
    assert 424 == total


def test_a_parameter_that_is_given_other_memory_takes_no_bytes_along() -> None:
    """The copy goes to the memory that the parameter had when it was copied to."""
    c = case(w=numbered(6))
    old, new = torch.zeros(6), torch.full((6,), -1.0)
    parameter = nn.Parameter(old)

    with c.load() as weights:
        parameter.copy_(dict(weights)["w"])
        parameter.data = new

    assert torch.equal(c.tensors["w"], old)
    assert [-1] * 6 == parameter.tolist()


def test_a_deferred_tensor_can_become_the_data_of_a_parameter() -> None:
    """``parameter.data = deferred`` gives the parameter the weights, and counts as written."""
    c = case(w=numbered(6))
    parameter = nn.Parameter(torch.zeros(6))

    with c.load(model={"p": parameter}) as weights:
        parameter.data = dict(weights)["w"]
        parameter.mul_(2)

    assert torch.equal(c.tensors["w"] * 2, parameter.data)


# -- writes to deferred tensors ---------------------------------------------------------------------------------------


def test_a_write_through_one_view_is_seen_by_all() -> None:
    """Deferred views share memory as views do, in both directions, and copies take the changed values."""
    c = case(w=numbered(3, 4))
    expected = c.tensors["w"].clone()
    destination = torch.zeros(3, 4)

    with c.load() as weights:
        w = dict(weights)["w"]
        column, again = w[:, 1], dict(weights)["w"]
        before = column.sum().item()
        column.mul_(10)
        w[0].zero_()
        w.view(-1)[5:7].fill_(-1)
        seen = [w.clone(), again.t().clone(), column.clone()]
        destination.copy_(again)

    assert expected[:, 1].sum().item() == before
    expected[:, 1].mul_(10)
    expected[0].zero_()
    expected.view(-1)[5:7].fill_(-1)
    assert all(itertools.starmap(torch.equal, zip([expected, expected.t(), expected[:, 1]], seen, strict=True)))
    assert torch.equal(expected, destination)


def test_copying_into_a_deferred_tensor_changes_it_for_its_readers() -> None:
    """``deferred.copy_(other deferred)`` is a write like any."""
    c = case(w=numbered(2, 3), v=numbered(3, start=50))
    c.storage.slow[c.offsets["v"]] = 0.03

    with c.load() as weights:
        w = dict(weights)
        row = w["w"][1]
        row.copy_(w["v"])
        value = w["w"].tolist()

    assert [[1, 2, 3], [50, 51, 52]] == value


def test_numpy_shares_memory_with_the_deferred_tensor() -> None:
    """What is written through the array is seen by later readers and copies."""
    c = case(w=numbered(4))
    destination = torch.zeros(4)

    with c.load() as weights:
        w = dict(weights)["w"]
        w.numpy()[2] = -5
        destination.copy_(w)

    assert [1, 2, -5, 4] == destination.tolist()


def test_a_plain_copy_does_not_change_the_deferred_tensor() -> None:
    """What a computation returns is its own: changing it changes no weights."""
    c = case(w=numbered(4))

    with c.load() as weights:
        w = dict(weights)["w"]
        for made in (w.clone(), w + 0, copy.deepcopy(w), pickle.loads(pickle.dumps(w)), torch.tensor(w.tolist())):
            made.zero_()
        value = w.tolist()

    assert [1, 2, 3, 4] == value


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.t_(),
        lambda w: w.resize_(2),
        lambda w: w.squeeze_(),
        lambda w: w.set_(torch.zeros(2)),
        lambda w: torch.cat([torch.ones(1, 4), torch.ones(1, 4)], out=w),
        lambda w: setattr(w, "data", torch.zeros(2)),
    ],
)
@pytest.mark.filterwarnings("ignore:An output with one or more elements was resized")
def test_what_would_change_the_shape_of_a_deferred_tensor_is_refused(change: Callable[[torch.Tensor], Any]) -> None:
    """A deferred tensor cannot follow, so the error comes before anything could be misread."""
    c = case(w=numbered(1, 4))

    with ignoring_that_nothing_was_used(), c.load() as weights, pytest.raises(mx.PlacementError):
        change(dict(weights)["w"])


def test_code_that_reaches_past_everything_gets_an_error() -> None:
    """A C function that asks a deferred tensor for its memory finds none, and says so."""
    c = case(w=numbered(4))

    with (
        ignoring_that_nothing_was_used(),
        c.load() as weights,
        pytest.raises(RuntimeError, match="Cannot access data pointer"),
    ):
        torch.utils.dlpack.to_dlpack(dict(weights)["w"])


def test_what_inference_mode_has_read_or_changed_can_be_used_outside_it() -> None:
    """The memory of a deferred tensor is ordinary memory, whatever mode happened to need it first."""
    c = case(read=numbered(4), changed=numbered(4))
    parameter = nn.Parameter(torch.ones(4))

    with c.load() as weights:
        w = dict(weights)
        with torch.inference_mode():
            assert 10 == w["read"].sum()
            w["changed"].add_(1)
        with torch.enable_grad():
            (parameter * w["read"]).sum().backward()
            (parameter * w["changed"][:]).sum().backward()
        w["changed"].mul_(2)
        changed = w["changed"].tolist()

    assert parameter.grad is not None
    assert [3, 5, 7, 9] == parameter.grad.tolist()
    assert [4, 6, 8, 10] == changed


# -- threads and ends -------------------------------------------------------------------------------------------------


def in_another_thread(function: Callable[[], Any]) -> Any:
    outcome: list[Any] = []

    def run() -> None:
        try:
            with torch.no_grad():
                outcome.append(function())
        except BaseException as exc:  # noqa: BLE001 - handed to the caller
            outcome.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(20)
    assert not thread.is_alive(), "the other thread is stuck"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


def test_deferred_tensors_work_in_another_thread() -> None:
    """There nothing watches later operations, so a copy is complete when it returns."""
    c = case(w=numbered(4, 2))
    c.storage.slow[c.offsets["w"]] = 0.03
    destination = torch.zeros(2, 2)

    with c.load() as weights:
        w = dict(weights)["w"]
        in_another_thread(lambda: destination.copy_(w.narrow(0, 2, 2)))
        seen = in_another_thread(destination.tolist)
        total = in_another_thread(lambda: (w * 2).sum().item())

    assert [[5, 6], [7, 8]] == seen
    assert 72 == total


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w.sum(),
        lambda w: torch.zeros(4).copy_(w),
        lambda w: w.tolist(),
        lambda w: w.add_(1),
        lambda w: w.numpy(),
        copy.deepcopy,
    ],
)
def test_use_after_the_end_is_an_error(use: Callable[[torch.Tensor], Any]) -> None:
    """A deferred tensor that outlived its load names itself and says what to do."""
    c = case(w=numbered(4), v=numbered(4))

    with c.load() as weights:
        w = dict(weights)
        w["v"].sum()

    with pytest.raises(mx.PlacementError, match="the deferred tensor w is used after its load has ended"):
        use(w["w"])


def test_what_was_read_from_a_deferred_tensor_outlives_the_load() -> None:
    """Plain tensors and the changed memory of deferred ones are ordinary tensors."""
    c = case(w=numbered(4))

    with c.load() as weights:
        w = dict(weights)["w"]
        clone, changed = w.clone(), w.add_(1)

    assert [1, 2, 3, 4] == clone.tolist()
    assert [2, 3, 4, 5] == changed.tolist()


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, StopIteration, GeneratorExit])
def test_an_error_in_the_block_ends_the_load_and_is_the_one_that_is_raised(kind: type[BaseException]) -> None:
    """Reads that wait are dropped, none writes any more, and the very exception comes out."""
    c = case(**{f"w{i}": numbered(1000, start=i) for i in range(40)})
    destinations = [torch.zeros(1000) for _ in range(40)]
    error = kind("mine")

    def block() -> None:
        with c.load() as weights:
            c.storage.gate.clear()
            for destination, (_, w) in zip(destinations, weights, strict=True):
                destination.copy_(w)
            raise error

    with pytest.raises(kind) as caught:
        block()
    before = [d.sum().item() for d in destinations]
    time.sleep(0.02)

    assert error is caught.value
    assert c.storage.closed
    assert before == [d.sum().item() for d in destinations]
    assert len(c.storage.reads) <= 4
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("mx-fetch")]


def test_a_failed_read_fails_the_load_though_the_code_that_loads_goes_on() -> None:
    """An error that the loading code swallows is raised again at the end."""
    c = case(w=numbered(4), v=numbered(4))
    c.storage.faults[c.offsets["w"]] = mx.AccessDeniedError("no")

    def block() -> None:
        with c.load() as weights, contextlib.suppress(mx.AccessDeniedError):
            dict(weights)["w"].sum()

    with pytest.raises(mx.AccessDeniedError):
        block()


def test_an_error_while_reads_are_planned_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies that were recorded and cannot be planned fail the load even if code swallows the error; nothing hangs."""
    c = case(w=numbered(4), v=numbered(4))
    destination = torch.zeros(4)
    planned = ReadPlanner.batches

    def failing(self: ReadPlanner, copies: Any) -> Any:
        if any(copy.info.name == "w" for copy in copies):
            raise OSError("cannot plan")
        return planned(self, copies)

    monkeypatch.setattr(ReadPlanner, "batches", failing)

    def block() -> None:
        with c.load() as weights:
            w = dict(weights)
            destination.copy_(w["w"])
            for _ in range(2):
                with contextlib.suppress(OSError):
                    destination.sum()

    with pytest.raises(OSError, match="cannot plan"):
        block()


# -- destinations -----------------------------------------------------------------------------------------------------


def test_a_leaf_that_requires_grad_is_refused_as_torch_does() -> None:
    """Without ``no_grad`` the copy raises; nothing is recorded."""
    c = case(w=numbered(4))
    parameter = nn.Parameter(torch.zeros(4))

    with (
        ignoring_that_nothing_was_used(),
        c.load() as weights,
        torch.enable_grad(),
        pytest.raises(RuntimeError, match="leaf Variable"),
    ):
        parameter.copy_(dict(weights)["w"])

    assert [0] * 4 == parameter.tolist()


def test_an_inference_tensor_is_written_in_inference_mode_only() -> None:
    """Outside it torch refuses; inside it the bytes go straight to it."""
    c = case(w=numbered(4))
    with torch.inference_mode():
        destination = torch.zeros(4)

    with c.load() as weights:
        w = dict(weights)["w"]
        with torch.enable_grad(), pytest.raises(RuntimeError, match="inference"):
            destination.copy_(w)
        with torch.inference_mode():
            destination.copy_(w)

    assert [1, 2, 3, 4] == destination.tolist()
    assert {} == weights.report.materialised_operations


def test_what_torch_cannot_write_it_refuses() -> None:
    """An expanded destination, a wrong shape: torch's own error, and the block can go on."""
    c = case(w=numbered(4))
    destination = torch.zeros(1)

    with c.load() as weights:
        w = dict(weights)["w"]
        with pytest.raises(RuntimeError, match="more than one element"):
            destination.expand(4).copy_(w)
        with pytest.raises(RuntimeError, match="expand"):
            torch.zeros(3).copy_(w)
        with pytest.raises(RuntimeError):
            torch.zeros(()).copy_(w[:1])
        destination.copy_(w[2:3])

    assert [3] == destination.tolist()


class Wrapped(torch.Tensor):
    """A tensor that keeps its values in another."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls: type[Wrapped], inner: torch.Tensor) -> Wrapped:
        self: Wrapped = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*(a.inner if isinstance(a, Wrapped) else a for a in args), **(kwargs or {}))
        return args[0] if func is torch.ops.aten.copy_.default else result

    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_destinations_whose_memory_is_not_their_own_get_their_values_from_torch() -> None:
    """Quantised, sparse and wrapping tensors, conjugated and negated views: materialised, and right."""
    c = case(w=numbered(4), z=torch.tensor([1 + 2j, 3 - 4j]))
    quantised = torch.quantize_per_tensor(torch.zeros(4), 0.5, 0, torch.qint8)
    sparse = torch.zeros(4).to_sparse()
    wrapped = Wrapped(torch.zeros(4))
    conjugated, negated = torch.zeros(2, dtype=torch.complex64), torch.zeros(2, dtype=torch.complex64)

    with c.load() as weights:
        w = dict(weights)
        quantised.copy_(w["w"])
        sparse.copy_(w["w"].to_sparse())
        wrapped.copy_(w["w"])
        conjugated.conj().copy_(w["z"])
        negated.conj().imag.copy_(w["w"][:2])

    assert [1, 2, 3, 4] == quantised.dequantize().tolist() == sparse.to_dense().tolist() == wrapped.inner.tolist()
    assert torch.equal(c.tensors["z"].conj(), conjugated)
    assert [-1, -2] == negated.imag.tolist()
    assert weights.report.materialised_operations


class Marked(nn.Parameter):
    """A class of parameters with its own idea of torch functions, as engines have."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_class_of_parameters_is_read_into_as_a_plain_one() -> None:
    """Its memory is its own, so nothing is materialised; where bytes are scattered, its functions are not asked."""
    c = case(w=numbered(4, 6))
    parameter = Marked(torch.zeros(6, 4), requires_grad=False)

    with c.load(model={"p": parameter}) as weights:
        parameter.data.t().copy_(dict(weights)["w"])

    assert torch.equal(c.tensors["w"].t(), parameter.data)
    assert {} == weights.report.materialised_operations


def test_dropping_an_imaginary_part_warns_where_it_is_done() -> None:
    """torch's warning comes from the copy itself, not from a thread that fetches."""
    c = case(z=torch.tensor([1 + 2j]))
    destination = torch.zeros(1)
    torch.set_warn_always(True)

    with c.load() as weights, pytest.warns(UserWarning, match="imaginary"):
        destination.copy_(dict(weights)["z"])
    torch.set_warn_always(False)

    assert [1] == destination.tolist()


def test_copies_to_the_meta_device_are_counted_and_move_nothing() -> None:
    """A destination without memory is no error by itself; that nothing was read into it shows in the report."""
    c = case(w=numbered(4))
    meta = torch.empty(4, device="meta")

    with c.load() as weights:
        meta.copy_(dict(weights)["w"])

    assert 1 == weights.report.meta_destinations
    assert [] == c.storage.reads


def test_a_model_on_the_meta_device_is_not_loaded() -> None:
    """With ``model=`` a parameter without memory is a tensor that was not written."""
    c = case(w=numbered(4))
    model = nn.ParameterDict({"w": nn.Parameter(torch.empty(4, device="meta"))})

    def block() -> None:
        with c.load(model) as weights:
            model["w"].copy_(dict(weights)["w"])

    with pytest.raises(mx.IncompleteLoadError, match="1 tensors of the model were not completely written: w"):
        block()


# -- coverage ---------------------------------------------------------------------------------------------------------


HALVES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "left": lambda p: p[:, :2],
    "top": lambda p: p[:2],
    "every second": lambda p: p.view(-1)[::2],
}


@pytest.mark.parametrize("which", HALVES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn, torch.uint8])
def test_a_partially_written_parameter_fails_the_load(dtype: torch.dtype, which: str) -> None:
    """Half of the columns, or every second element, is not the whole; the message names the parameter."""
    c = case(w=numbered(4, 4, dtype=dtype))
    parameter = torch.zeros(4, 4, dtype=dtype)
    half = HALVES[which](parameter)

    def block() -> None:
        with c.load({"whole": torch.zeros(4, 4, dtype=dtype), "half": parameter}) as weights:
            half.copy_(dict(weights)["w"].view(-1)[:8].view(half.shape))

    with pytest.raises(mx.IncompleteLoadError, match="2 tensors of the model were not completely written") as caught:
        block()

    assert ("half", "whole") == caught.value.missing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e4m3fn])
def test_parts_make_a_whole(dtype: torch.dtype) -> None:
    """Two halves, columns that interleave, materialised values, a tied name: all are written."""
    c = case(w=numbered(4, 4, dtype=dtype))
    rows, columns, fresh = (torch.zeros(4, 4, dtype=dtype) for _ in range(3))
    model = {"rows": rows, "columns": columns, "fresh": fresh, "tied": rows.t(), "none": torch.zeros(0, 3)}

    with c.load(model) as weights:
        w = dict(weights)["w"]
        rows[:2].copy_(w[:2])
        rows[2:].copy_(w[2:])
        columns[:, ::2].copy_(w[:, ::2])
        columns[:, 1::2].copy_(w[:, 1::2])
        fresh.copy_(w.float() * 2)

    assert torch.equal(c.tensors["w"].float(), rows.float())
    assert torch.equal(c.tensors["w"].float(), columns.float())
    assert torch.equal((c.tensors["w"].float() * 2).to(dtype).float(), fresh.float())


def test_what_only_looks_like_a_write_does_not_count() -> None:
    """A copy that raised and a change of shape in place leave the parameter unwritten."""
    c = case(w=numbered(4, 4))
    tried, turned = torch.zeros(4, 3), torch.zeros(4, 4)

    def block() -> None:
        with c.load({"tried": tried, "turned": turned}) as weights:
            w = dict(weights)["w"]
            with contextlib.suppress(RuntimeError):
                tried.copy_(w)
            with contextlib.suppress(RuntimeError):
                tried.copy_(w + 1)
            turned.t_()

    with pytest.raises(mx.IncompleteLoadError) as caught:
        block()

    assert ("tried", "turned") == caught.value.missing


def test_a_parameter_that_hides_its_memory_counts_when_it_is_written() -> None:
    """Of a wrapping or sparse tensor only a write to itself is known."""
    c = case(w=numbered(4))
    model = {"written": Wrapped(torch.zeros(4)), "left": Wrapped(torch.zeros(4)), "sparse": torch.zeros(4).to_sparse()}

    def block() -> None:
        with c.load(model) as weights:
            model["written"].copy_(dict(weights)["w"])

    with pytest.raises(mx.IncompleteLoadError) as caught:
        block()

    assert ("left", "sparse") == caught.value.missing
    assert [1, 2, 3, 4] == model["written"].inner.tolist()


def test_a_load_of_which_nothing_is_used_fails() -> None:
    """Code that knows none of the names did not load a model."""
    c = case(w=numbered(4))

    def block() -> None:
        with c.load() as weights:
            for name, _ in weights:
                assert name == "w"

    with pytest.raises(mx.IncompleteLoadError, match=r"no tensor of gated://deferred-\d+ was used"):
        block()


# -- the account ------------------------------------------------------------------------------------------------------


def test_the_report_counts_what_was_needed_and_what_was_computed_with() -> None:
    """Bytes of views, each use once; operations that made plain tensors, by name."""
    c = case(w=numbered(8, 8), v=numbered(16))
    half = torch.zeros(4, 8)

    with c.load() as weights:
        w = dict(weights)
        half.copy_(w["w"][4:])
        half.copy_(w["w"][:4])
        total = w["v"][:4].sum() + w["v"][:4].sum()
        doubled = w["v"] * 2
        w["v"][0].zero_()

    report = weights.report
    assert (20, 32) == (total.item(), doubled[-1].item())
    assert {"aten.sum": 2, "aten.mul": 1, "write": 1} == report.materialised_operations
    assert 16 + 16 + 64 + 64 == report.bytes_materialised
    assert 128 + 128 + report.bytes_materialised == report.bytes_needed
    assert report.bytes_needed == report.bytes_fetched
    assert (2, 2, 1) == (report.tensors, report.tensors_in_checkpoint, report.files)


def test_reading_twice_through_one_handle_fetches_once() -> None:
    """What a handle has read is kept as long as the handle."""
    c = case(w=numbered(8))

    with c.load() as weights:
        w = dict(weights)["w"]
        total = w.sum() + w.mean() + w.amax()

    assert 36 + 4.5 + 8 == total.item()
    assert 1 == weights.report.requests
    assert 32 == weights.report.bytes_fetched


def test_elements_that_a_view_repeats_are_read_once() -> None:
    """An expanded view needs the bytes of what it expands."""
    c = case(w=numbered(8))

    with c.load() as weights:
        total = dict(weights)["w"][:2].unsqueeze(0).expand(100, -1).sum().item()

    assert 300 == total
    assert (8, 8) == (weights.report.bytes_needed, weights.report.bytes_fetched)


def test_small_tensors_are_there_before_they_are_asked_for() -> None:
    """Scales and norms come in merged reads at the start, and computing with them sends no request."""
    small = {f"scale{i}": numbered(4, start=i) for i in range(20)}
    c = case(request_cost_bytes=1024, w=torch.zeros(64, 1024), **small)
    destinations = torch.zeros(20, 4)

    with c.load() as weights:
        for i in range(20):
            w = dict(weights)[f"scale{i}"]
            destinations[i].copy_(w * 2 if i % 2 else w)
        before = len(c.storage.reads)
        last = dict(weights)["scale19"].sum().item()

    assert [i * (1 + i % 2) for i in range(20)] == destinations[:, 0].tolist()
    assert 19 + 20 + 21 + 22 == last
    assert 1 == before == len(c.storage.reads)
    assert 20 * 16 == weights.report.bytes_fetched
    assert 20 * 16 + 16 == weights.report.bytes_needed


def test_small_tensors_that_are_half_the_checkpoint_are_not_fetched_ahead() -> None:
    """A rank may not need them, so they are read when they are."""
    c = case(a=numbered(8), b=numbered(8))

    with c.load() as weights:
        dict(weights)["a"].sum()

    assert 32 == weights.report.bytes_fetched


@pytest.mark.parametrize("name", ["w", "small"])
def test_every_dtype_is_copied_as_it_is_and_cast(name: str) -> None:
    """Bit for bit where the dtype is the destination's, as torch casts where it is not, fetched ahead or not."""
    for dtype in (torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.float8_e5m2, torch.uint16):
        whole = numbered(64, 64, start=-100, dtype=dtype)
        c = case(w=whole, small=whole[0, :8].clone())
        stored = c.tensors[name]
        same, cast = torch.zeros(stored.shape, dtype=dtype), torch.zeros(stored.shape[::-1]).t()

        with c.load() as weights:
            same.copy_(dict(weights)[name])
            cast.copy_(dict(weights)[name])

        assert torch.equal(stored.view(torch.uint8), same.view(torch.uint8))
        assert torch.equal(stored.float(), cast)
        assert {} == weights.report.materialised_operations


def test_packed_four_bit_values_are_copied_bit_for_bit() -> None:
    """torch can do little with them; a copy, straight or with gaps, is exact."""
    values = torch.arange(256, dtype=torch.uint8).view(16, 16)
    c = case(w=values.view(torch.float4_e2m1fn_x2))
    whole = torch.zeros(16, 16, dtype=torch.uint8)
    columns = torch.zeros(16, 16, dtype=torch.uint8)

    with c.load() as weights:
        w = dict(weights)["w"]
        whole.view(torch.float4_e2m1fn_x2).copy_(w)
        columns[:, ::2].view(torch.uint8).copy_(w.view(torch.uint8)[:, :8])
        clone = w.clone()

    assert torch.equal(values, whole)
    assert torch.equal(values[:, :8], columns[:, ::2])
    assert torch.equal(values, clone.view(torch.uint8))


# -- shortcuts --------------------------------------------------------------------------------------------------------


def test_what_is_done_to_every_weight_takes_the_short_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading the experts of a layer into stacked parameters, as engines do, never goes through torch's dispatch."""
    weights = {f"{kind}{e}": numbered(8, 6, start=100 * e + len(kind)) for e in range(3) for kind in ("up", "gate")}
    c = case(**weights, scale=numbered(3), norm=numbered(6))
    stacked = nn.Parameter(torch.zeros(3, 8, 6), requires_grad=False)
    scales, norm = torch.zeros(2, 3), torch.zeros(6)
    seen: list[Any] = []
    dispatch = OperationInterceptor.dispatch
    monkeypatch.setattr(OperationInterceptor, "dispatch", lambda *args: (seen.append(args[1]), dispatch(*args))[1])

    with c.load() as loading:
        for name, weight in loading:
            match name[:-1]:
                case "up" | "gate" as kind:
                    expert = stacked.data[int(name[-1])]
                    expert.narrow(0, 0 if kind == "gate" else 4, 4).copy_(weight.narrow(0, 2, 4))
                case "scal":
                    scales.data[1] = weight.detach()
                case _:
                    norm.copy_(weight.select(0, 3) if weight.dim() > 1 else weight[0:6])

    assert [] == seen
    expected = torch.stack([torch.cat([weights[f"{kind}{e}"][2:6] for kind in ("gate", "up")]) for e in range(3)])
    assert torch.equal(expected, stacked)
    assert torch.equal(torch.stack([torch.zeros(3), numbered(3)]), scales)
    assert torch.equal(numbered(6), norm)


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("outer", [False, True])
def test_other_modes_of_dispatch_see_what_is_done(outer: bool) -> None:
    """A mode of the user's, around the load or within it, is not passed over."""
    c = case(w=numbered(4, 4))
    destination = torch.zeros(2, 4, 4)
    around, within = (Watching(), contextlib.nullcontext()) if outer else (contextlib.nullcontext(), Watching())

    with around, c.load() as weights, within:
        w = dict(weights)["w"]
        (around if outer else within).seen.clear()
        destination[1].copy_(w.t())
        destination[0] = w.narrow(0, 0, 4)
        mode = around if outer else within
        seen = list(mode.seen)

    assert {"aten::select.int"} <= set(seen)
    assert outer or {"aten::copy_", "aten::t"} <= set(seen)
    assert torch.equal(torch.stack([numbered(4, 4), numbered(4, 4).t()]), destination)


def test_a_switch_that_hides_operations_from_modes_stays_as_it_is() -> None:
    """Code that had switched modes off finds them off after what it does to plain tensors."""
    c = case(w=numbered(4))
    plain = torch.zeros(3, 4)

    with ignoring_that_nothing_was_used(), c.load(), torch._C._DisableTorchDispatch():
        part = plain[1].narrow(0, 1, 2)
        off = torch._C._dispatch_tls_is_dispatch_key_excluded(torch._C.DispatchKey.Python)

    assert (2,) == part.shape
    assert off


@pytest.mark.parametrize("name", ["w", "small"])
def test_a_copy_counts_as_a_change_of_its_destination(name: str) -> None:
    """Autograd notices that a tensor which it keeps for a backward pass was loaded over."""
    c = case(w=numbered(64, 64), small=numbered(4))
    kept = torch.zeros(c.tensors[name].shape)
    parameter = nn.Parameter(torch.ones(c.tensors[name].shape))

    with torch.enable_grad():
        result = (parameter * kept).sum()
        before = kept._version
        with c.load() as weights:
            kept.copy_(dict(weights)[name])
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward()

    assert before < kept._version


@pytest.mark.parametrize("name", ["w", "small"])
def test_a_copy_that_torch_refuses_is_refused(name: str) -> None:
    """A parameter that requires gradients, outside no_grad; a tensor of inference mode, outside of it."""
    c = case(w=numbered(64, 64), small=numbered(4))
    parameter = nn.Parameter(torch.zeros(c.tensors[name].shape))
    with torch.inference_mode():
        inference = torch.zeros(c.tensors[name].shape)

    with ignoring_that_nothing_was_used(), c.load() as weights:
        w = dict(weights)[name]
        with torch.enable_grad(), pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            parameter.copy_(w)
        with torch.enable_grad(), pytest.raises(RuntimeError, match="requires grad"):
            parameter[...] = w
        with pytest.raises(RuntimeError, match="inference tensor outside InferenceMode"):
            inference.copy_(w)
        with torch.inference_mode():
            inference.copy_(w)

    assert not parameter.any()
    assert torch.equal(c.tensors[name], inference)


def test_copies_in_one_batch_to_the_same_memory_are_done_in_order() -> None:
    """The last one counts, though nothing asked for the memory in between."""
    c = case(**{f"w{i}": numbered(40, 50, start=1000 * i) for i in range(6)})
    destination = torch.zeros(40, 50)
    c.storage.slow[c.offsets["w0"]] = 0.05

    with c.load() as weights:
        for _, w in weights:
            destination.copy_(w)
            destination[3:5].copy_(w[1:3])
            destination[:, 7] = w[:, 9]

    expected = numbered(40, 50, start=5000)
    expected[3:5] = numbered(40, 50, start=5000)[1:3]
    expected[:, 7] = numbered(40, 50, start=5000)[:, 9]
    assert torch.equal(expected, destination)


def test_an_interrupt_while_copies_are_scheduled_ends_the_load() -> None:
    """If code catches the interrupt that stopped its copies, the load still raises: they are not lost silently."""
    c = case(w=numbered(4000), v=numbered(4000))
    destination = torch.zeros(4000)

    with pytest.raises(KeyboardInterrupt), c.load() as weights:
        found = dict(weights)
        destination.copy_(found["w"])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pending_copies, "region_of", _interrupted)
            with contextlib.suppress(KeyboardInterrupt):
                destination.sum()


def _interrupted(_: torch.Tensor) -> None:
    raise KeyboardInterrupt


# -- memory and time --------------------------------------------------------------------------------------------------


def test_what_was_read_is_not_kept() -> None:
    """Tensors that are computed with one after another are freed one after another."""
    c = case(**{f"w{i}": numbered(1000, start=i) for i in range(10)})
    alive: list[weakref.ref[Any]] = []

    with c.load() as weights:
        for _, w in weights:
            alive.append(weakref.ref(w))
            assert w.sum() > 0
            del w
        kept = len(weights._load.recorder._pending), sum(ref() is not None for ref in alive)

    assert (0, 0) == kept


def test_destinations_are_let_go_when_their_bytes_are_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that code copies to and gives up is not held until the end of the load."""
    monkeypatch.setattr(PendingCopies, "limits", CopyLimits(purge_bytes=8000))
    c = case(**{f"w{i}": numbered(1000, start=i) for i in range(40)})
    most = 0

    with c.load() as weights:
        for _, w in weights:
            assert torch.empty(1000).copy_(w).sum() > 0
            most = max(most, len(weights._load.recorder._pending))
    left = len(weights._load.recorder._pending)

    assert most <= 8
    assert 0 == left


def test_recording_stays_cheap_while_nothing_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a storage that is slower than the recording, pending copies are not searched again and again."""
    monkeypatch.setattr(PendingCopies, "limits", CopyLimits(purge_copies=16))
    looked: list[int] = []
    purge = PendingMemory.purge
    monkeypatch.setattr(PendingMemory, "purge", lambda self: (looked.append(len(self)), purge(self))[1])
    c = case(w=numbered(2000))
    destination = torch.zeros(2000)

    with c.load() as weights:
        c.storage.gate.clear()
        for part, to in zip(dict(weights)["w"].split(1), destination.split(1), strict=True):
            to.copy_(part)
        c.storage.gate.set()

    assert torch.equal(c.tensors["w"], destination)
    assert sum(looked) <= 3 * 2000


# -- loads within loads -----------------------------------------------------------------------------------------------


def test_a_load_within_a_load_reads_each_tensor_from_its_own_checkpoint() -> None:
    """Two checkpoints with the same file name and tensor names are not mixed up, and the later copy wins."""
    outer, inner = case(w=numbered(4)), case(w=numbered(4, start=100))
    outer.storage.slow[outer.offsets["w"]] = 0.03
    buffers = torch.zeros(5, 4)

    with outer.load() as outer_weights:
        outer_w = dict(outer_weights)["w"]
        buffers[0].copy_(outer_w)
        buffers[1].copy_(outer_w)
        with inner.load() as inner_weights:
            inner_w = dict(inner_weights)["w"]
            buffers[1].copy_(inner_w)
            buffers[2].copy_(inner_w)
            buffers[2].copy_(outer_w)
            buffers[3].copy_(outer_w[1:3].repeat(2) + inner_w)
        with pytest.raises(mx.PlacementError, match="after its load has ended"):
            inner_w.sum()
        buffers[4].copy_(outer_w)

    expected = [[1, 2, 3, 4], [100, 101, 102, 103], [1, 2, 3, 4], [102, 104, 104, 106], [1, 2, 3, 4]]
    assert expected == buffers.tolist()


def test_load_into_within_a_block_comes_after_what_was_recorded() -> None:
    """A whole load is an operation like any: what was copied to its destinations before is overwritten."""
    outer, inner = case(w=numbered(4)), case(w=numbered(4, start=100))
    outer.storage.slow[outer.offsets["w"]] = 0.03
    destination = torch.zeros(4)

    with outer.load() as weights:
        destination.copy_(dict(weights)["w"])
        mx.load_into({"w": destination}, f"gated://{inner.name}", environ={}, plugins=inner.plugins)
        state = mx.load_state_dict(f"memory://{inner.name}", environ={})

    assert [100, 101, 102, 103] == destination.tolist() == state["w"].tolist()


def test_weights_can_be_iterated_again_and_are_counted() -> None:
    """Each pass yields the same tensors; ``len`` is that of the checkpoint."""
    c = case(w=numbered(4), v=numbered(2))

    with c.load() as weights:
        names = [name for name, _ in weights], [name for name, _ in weights]
        count = len(weights)
        dict(weights)["w"].sum()

    assert (["v", "w"], ["v", "w"], 2) == (*(sorted(n) for n in names), count)
