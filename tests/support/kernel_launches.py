"""Counts the kernel launches of a step without a GPU: ATen operations that would start at least one CUDA kernel.

The step runs on the CPU. Views, metadata and allocations without a fill launch nothing. Collectives and host work
(_HOST_WORK) are not counted. An operation counts once, although some (sort, topk) start several kernels.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.devices import calling_function

_FREE = {
    "aten::_local_scalar_dense",
    "aten::_unsafe_view",
    "aten::detach_",
    "aten::empty",
    "aten::empty_like",
    "aten::empty_strided",
    "aten::lift_fresh",
    "aten::new_empty",
    "aten::new_empty_strided",
    "aten::set_",
}

_HOST_WORK = {  # on integers
    "moe_dist.model.attention.BucketedDocuments.build",
    "moe_dist.model.moe.experts.grouped_matmul",
}


class Launches(TorchDispatchMode):
    """Counts the launching operations that run inside it, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        on_host = calling_function() in _HOST_WORK and not any(tensor.is_floating_point() for tensor in tensors)
        if tensors and not on_host and _launches(function):
            self.counts[function._schema.name.removeprefix("aten::")] += 1
        return result


def _launches(function: Any) -> bool:
    name = function._schema.name
    is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in function._schema.returns)
    return name.startswith("aten::") and name not in _FREE and not is_view
