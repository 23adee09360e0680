"""Chains of small tensor operations as one GPU kernel each.

A function decorated with `fused` is compiled by torch.compile when its first tensor is on a GPU. On other devices it
runs operation by operation: CPU results stay what the operations say, and are the oracle of the compiled function.
TORCH_COMPILE_DISABLE=1 turns compilation off.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Tensor])


def fused(function: Function) -> Function:
    """Compile `function` for GPUs: forward and backward become one kernel each where Inductor can fuse them.

    Its first argument is a tensor. It is compiled on first use, in a few seconds, and once more when a size changes,
    then for every size.
    """
    compiled = torch.compile(function)

    @wraps(function)
    def run(x: Tensor, *arguments: object) -> Tensor:
        return (compiled if is_compiled_for(x) else function)(x, *arguments)

    return run  # type: ignore[return-value]


def is_compiled_for(x: Tensor) -> bool:
    return x.is_cuda
