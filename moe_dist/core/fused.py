"""Chains of small tensor operations as one GPU kernel each.

A function decorated with `fused` is compiled by torch.compile when its first tensor is on a GPU. Elsewhere it runs
operation by operation, which is the oracle of the compiled function. It does so on a GPU too under
TORCH_COMPILE_DISABLE=1, and under train.deterministic: how a compiled sum is split depends on the sizes that a process
saw before, so a resumed run could round differently.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Tensor])
_VARIANTS = 32  # with and without gradients, for one size and for any, in each dtype; torch's 8 can be too few


def fused(function: Function) -> Function:
    """Compile `function` for GPUs: forward and backward become one kernel each where Inductor can fuse them.

    Its first argument is a tensor. It is compiled on first use, in a few seconds, and once more when a size changes,
    then for every size. Without or with one row it runs as it is: compilers treat these sizes on their own.
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
    """Return whether a fused function of x runs compiled."""
    return x.is_cuda and not (torch._dynamo.config.disable or torch.are_deterministic_algorithms_enabled())
