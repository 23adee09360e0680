"""Counts the kernel launches of a step without a GPU: ATen operations that would start at least one CUDA kernel.

The step runs on the CPU. Views, metadata and allocations without a fill launch nothing; collectives and the host's own
work (devices.HOST_WORK) are not counted. An operation counts once, although some (sort, topk) start several kernels.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from tests.devices import HOST_WORK, calling_function

_FREE = {
    "aten::_local_scalar_dense", "aten::_unsafe_view", "aten::detach_", "aten::empty", "aten::empty_like",
    "aten::empty_strided", "aten::lift_fresh", "aten::new_empty", "aten::new_empty_strided", "aten::set_",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts the launching operations that run inside it, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _launches(function) and calling_function() not in HOST_WORK:
            self.counts[function._schema.name.removeprefix("aten::")] += 1
        return function(*args, **(kwargs or {}))


def _launches(function: Any) -> bool:
    name = function._schema.name
    is_view = any(value.alias_info is not None and not value.alias_info.is_write for value in function._schema.returns)
    return name.startswith("aten::") and name not in _FREE and not is_view
