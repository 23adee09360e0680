"""Page-locked host memory of exactly the requested size.

PyTorch rounds the size of pinned memory up to a power of two, so a snapshot of 17.8 GB would take 32 GB. This module
allocates ordinary memory instead, rounded up to whole pages, and registers it with CUDA.
"""

from __future__ import annotations

import mmap
import warnings
import weakref
from contextlib import suppress

import torch
from torch import Tensor

PORTABLE = 1  # cudaHostRegisterPortable: page-locked for every device


def empty_pinned(numel: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor in uninitialised page-locked host memory. The memory is released with the tensor.

    If CUDA cannot page-lock the memory, warn and return a tensor in ordinary memory. Copies from a GPU are then slower,
    but still correct. Raises RuntimeError if there is not enough memory.
    """
    size, page = numel * dtype.itemsize, mmap.PAGESIZE
    whole = -(-size // page) * page
    memory = torch.empty(whole + page, dtype=torch.uint8)
    first = -memory.data_ptr() % page
    tensor = memory[first : first + size].view(dtype)
    if not size:
        return tensor
    address = tensor.data_ptr()
    if error := register(address, whole):
        warnings.warn(
            f"CUDA cannot page-lock {size / 2**30:.2f} GiB of host memory (cudaHostRegister: error {error}): "
            "checkpoint.asynchronous copies into ordinary memory, and training waits longer for each checkpoint",
            stacklevel=2,
        )
    else:
        # Unregister before the memory is freed. At process exit that is not needed.
        weakref.finalize(tensor, _unregister, address).atexit = False
    return tensor


def register(address: int, size: int) -> int:
    """Page-lock `size` bytes of host memory at `address`. Return CUDA's error code, which is 0 on success."""
    if error := int(torch.cuda.cudart().cudaHostRegister(address, size, PORTABLE)):
        _forget_error()
    return error


def _unregister(address: int) -> None:
    if int(torch.cuda.cudart().cudaHostUnregister(address)):
        _forget_error()


def _forget_error() -> None:
    """Launch a kernel to clear the error that a failed CUDA call left. Otherwise the next launch would raise it."""
    with suppress(RuntimeError):
        torch.ones(1, device="cuda")
