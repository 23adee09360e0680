"""Fusion of chains of small tensor operations into single GPU kernels.

A function decorated with `fused` is compiled by torch.compile if its first tensor is on a GPU. Elsewhere the function
runs uncompiled, and the uncompiled result is the reference for the compiled one.

TORCH_COMPILE_DISABLE=1 and train.deterministic turn compilation off. With compilation, a resumed run could round
differently, because the summation order of compiled code depends on the sizes that the process has seen before.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Tensor])
_VARIANTS = 32  # with and without gradients, static and dynamic sizes, each dtype; torch's 8 can be too few


def fused(function: Function) -> Function:
    """Compile `function` for GPUs. The forward and backward pass become one kernel each if Inductor can fuse them.

    The first argument must be a tensor. The function is compiled on first use, which takes a few seconds, and compiled
    again when a size first changes, this time for all sizes. If the first argument has no rows or one row, the function
    runs uncompiled, because torch.compile would specialise on these sizes.
    """

    @cache
    def compiled() -> Callable[..., Tensor]:
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _VARIANTS)
        return torch.compile(function)

    @wraps(function)
    def run(x: Tensor, *arguments: object) -> Tensor:
        return (compiled() if is_compiled_for(x) and len(x) > 1 else function)(x, *arguments)

    return run  # type: ignore[return-value]


def is_compiled_for(x: Tensor) -> bool:
    """Return whether compilation is on for x: x is on a GPU, and compilation is not turned off.

    Even then, a fused function runs uncompiled if x has no rows or one row.
    """
    return x.is_cuda and not (torch._dynamo.config.disable or torch.are_deterministic_algorithms_enabled())
