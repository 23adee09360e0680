"""Registration of host memory with CUDA, whose runtime needs a GPU. A stand-in records calls and refuses some."""

import gc
import mmap
import warnings

import pytest
import torch

from moe_dist.checkpoint import pinned
from moe_dist.checkpoint.pinned import empty_pinned
from moe_dist.checkpoint.saver import HostBuffers
from moe_dist.checkpoint.storage import Fragment
from moe_dist.core.errors import UserError

PAGE = mmap.PAGESIZE


class Runtime:
    """A stand-in for cudaHostRegister and cudaHostUnregister, which return error codes."""

    def __init__(self, error=0):
        self.error, self.registered, self.calls, self.forgotten = error, {}, 0, 0

    def cudaHostRegister(self, address, size, flags):
        assert flags == 1
        self.calls += 1
        if not self.error:
            mine = range(address, address + size)
            others = [range(start, start + length) for start, length in self.registered.items()]
            assert not any(mine.start < other.stop and other.start < mine.stop for other in others)
            self.registered[address] = size
        return self.error

    def cudaHostUnregister(self, address):
        del self.registered[address]
        return 0

    def forget_error(self):
        self.forgotten += 1


@pytest.fixture
def runtime(monkeypatch):
    runtime = Runtime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(pinned, "_forget_error", runtime.forget_error)
    return runtime


def fragment(name, numel, dtype=torch.float32):
    return Fragment(name, (numel,), 0, torch.arange(numel).to(dtype))


@pytest.mark.parametrize("numel", [1, PAGE // 4, PAGE // 4 + 1, 1_000_003])
def test_whole_pages_of_its_own_and_no_power_of_two(numel, runtime):
    tensors = [empty_pinned(numel, dtype) for dtype in (torch.float32, torch.float32, torch.int64)]
    for tensor in tensors:
        assert tensor.numel() == numel and tensor.data_ptr() % PAGE == 0
        size = runtime.registered[tensor.data_ptr()]
        assert size % PAGE == 0 and tensor.nbytes <= size < tensor.nbytes + PAGE
        storage = tensor.untyped_storage()
        assert tensor.data_ptr() + size <= storage.data_ptr() + storage.nbytes(), "the pages hold nothing else"
        assert storage.nbytes() <= tensor.nbytes + 2 * PAGE
    del tensor, tensors
    gc.collect()
    assert runtime.registered == {} and runtime.forgotten == 0


def test_nothing_is_registered_for_no_element(runtime):
    assert empty_pinned(0, torch.float32).numel() == 0 and runtime.calls == 0


def test_snapshots_are_registered_once_and_released_when_they_grow(runtime):
    buffers = HostBuffers(pinned=True)
    small, large = [[fragment("master/x", numel), fragment("buffer/y", 3, torch.int64)] for numel in (5000, 9000)]
    for _ in range(2):
        copies = buffers.copy(small)
    assert runtime.calls == 2 and len(runtime.registered) == 2
    assert all(torch.equal(copy.tensor, live.tensor) for copy, live in zip(copies, small))
    del copies
    copies = buffers.copy(large)  # the moments come with the first step
    assert runtime.calls == 3 and len(runtime.registered) == 2
    assert all(torch.equal(copy.tensor, live.tensor) for copy, live in zip(copies, large))
    assert buffers.nbytes == 9000 * 4 + 3 * 8
    del copies, buffers
    assert runtime.registered == {}


def test_memory_that_cannot_be_page_locked_is_used_as_it_is(runtime):
    """The stand-in returns error 2, out of memory, as in a container that limits locked pages."""
    runtime.error = 2
    buffers, live = HostBuffers(pinned=True), [fragment("master/x", 2**20)]
    with pytest.warns(UserWarning, match=r"cannot page-lock 0\.00 GiB of host memory \(cudaHostRegister: error 2\)"):
        copies = buffers.copy(live)
    assert torch.equal(copies[0].tensor, live[0].tensor) and runtime.forgotten == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffers.copy(live)  # the same memory again
    del copies, buffers  # nothing to unregister


def test_no_memory_for_a_pinned_snapshot(runtime):
    huge = Fragment("master/x", (2**45,), 0, torch.zeros(1).expand(2**45))
    with pytest.raises(UserError, match=r"no memory for a snapshot of 131072\.0 GiB per rank"):
        HostBuffers(pinned=True).copy([huge])
    assert runtime.calls == 0
