"""Detects host work in a step without a device: fake `cuda` tensors run a forward pass, meta tensors also a backward
pass.

Neither kind holds values, so any operation that reads one (`.item()`, `.tolist()`, `bool(...)`, `nonzero`, indexing by
a mask) raises PyTorch's own error. `HotPath` detects two things that these kinds allow: tensors created on the CPU, and
copies that wait.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from moe_dist.model.mixture_of_depths import MixtureOfDepths
from moe_dist.model.moe.dispatch import split_sizes
from moe_dist.model.moe.moe_layer import MoELayer

# Functions that may work on the CPU: they copy small facts that the host already knows, without waiting.
HOST_WORK = {
    "moe_dist.model.moe.experts.grouped_matmul",  # where each expert's rows end, from the split sizes
    "moe_dist.model.moe.dispatch.AllToAllDispatcher._exchange_counts",  # the order of the experts over the ranks
    "moe_dist.model.attention.VarlenDocuments.build",  # once per micro-batch, from the documents' lengths
    "moe_dist.model.attention.BucketedDocuments.build",
    "moe_dist.core.batch._sums",  # where the parts of groups, sequences and documents end that mixture-of-depths admits
}
_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class OnTheHost(AssertionError):
    """The hot path created or read a CPU tensor, or waited for a copy."""


class HotPath(TorchDispatchMode):
    """Raises OnTheHost at every operation with a CPU tensor outside HOST_WORK, and at every copy that waits.

    PyTorch treats a number among the operands as a CPU tensor of no dimension. That costs nothing and is allowed. So is
    a new tensor without elements, which the checkpoint function of torch 2.11 creates.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        if function is torch.ops.aten.empty.memory_format and result.numel() == 0:
            return result
        read, made = _devices((args, kwargs)), _devices(result)
        if "cpu" in read | made:
            if calling_function() not in HOST_WORK and function is not torch.ops.aten.scalar_tensor.default:
                raise OnTheHost(f"{function} reads tensors of {sorted(read)} and makes one of {sorted(made)}")
            waits = function in _COPIES and read | made != {"cpu"} and not kwargs.get("non_blocking")
            if waits or ("cpu" in made and read - {"cpu"}):
                raise OnTheHost(f"{function} waits for a copy from {sorted(read)} to {sorted(made)}")
        return result


def _devices(values: Any) -> set[str]:
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    return {t.device.type for t in tensors if not (t.device.type == "cpu" and t.dim() == 0 and _is_number(t))}


def _is_number(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float64, torch.int64, torch.bool) and not tensor.requires_grad


def calling_function() -> str | None:
    """Return the innermost function of moe_dist on the stack; None in a backward pass."""
    frame = sys._getframe(1)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("moe_dist."):
            return f"{module}.{frame.f_code.co_qualname}"
        frame = frame.f_back
    return None


def expert_layers(model: nn.Module) -> list[MoELayer]:
    return [module for module in model.modules() if isinstance(module, MoELayer)]


def readers(model: nn.Module) -> list[Any]:
    """Return the modules that read counts from the device by split_sizes: every expert layer and every layer with
    mixture-of-depths.
    """
    depths = [module for module in model.modules() if isinstance(module, MixtureOfDepths)]
    return [*(layer.dispatcher for layer in expert_layers(model)), *depths]


def read_counts(model: nn.Module, *inputs: Any) -> list[Any]:
    """Return the counts that every reader reads in a forward pass of a model on the CPU."""
    counts: dict[int, list] = {}

    def recorded(tensor: Tensor, number: int) -> list:
        counts[number] = split_sizes(tensor)
        return counts[number]

    for number, reader in enumerate(readers(model)):
        reader.split_sizes = partial(recorded, number=number)
    model(*inputs)
    return [counts[number] for number in sorted(counts)]


def inject(model: nn.Module, counts: Sequence[Any]) -> list[int]:
    """Give the readers these counts to read. The returned list has the number of reads of each."""
    calls = [0] * len(counts)
    for number, (reader, known) in enumerate(zip(readers(model), counts, strict=True)):

        def answer(tensor: Tensor, number: int = number, known: Any = known) -> Any:
            assert tuple(tensor.shape) == np.shape(known)
            calls[number] += 1
            return known

        reader.split_sizes = answer
    return calls


def on_fake_cuda(value: Any, mode: FakeTensorMode) -> Any:
    """Convert a tensor, or a record of tensors (Batch, TokenInfo), to fake `cuda` tensors."""
    if isinstance(value, Tensor):
        with mode, torch.no_grad():
            return mode.from_tensor(value).to("cuda:0", non_blocking=True)  # a copy that waits needs a real device
    if hasattr(value, "__dataclass_fields__"):
        return replace(value, **{f.name: on_fake_cuda(getattr(value, f.name), mode) for f in fields(value)})
    if isinstance(value, dict):
        return {key: on_fake_cuda(item, mode) for key, item in value.items()}
    return value


def model_on_fake_cuda(model: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Replace a model's parameters by fake ones. They have no gradients, because autograd would need a real device."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(on_fake_cuda(parameter.detach(), mode), requires_grad=False))
    return model


class PythonOperators(TorchFunctionMode):
    """Replaces `x[...]` and `~x` by the operations they stand for. PyTorch's own versions need a device guard, which a
    CPU build lacks for `cuda`. An index that is a tensor becomes PyTorch's operation, which fake tensors refuse for a
    mask.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.__invert__:
            return args[0].bitwise_not()
        if function is not Tensor.__getitem__:
            return function(*args, **(kwargs or {}))
        x, index = args
        items = list(index) if isinstance(index, tuple) else [index]
        if any(isinstance(item, Tensor) for item in items):
            return torch.ops.aten.index.Tensor(x, [item if isinstance(item, Tensor) else None for item in items])
        if Ellipsis in items:
            place = items.index(Ellipsis)
            missing = x.dim() - sum(item is not None and item is not Ellipsis for item in items)
            items[place : place + 1] = [slice(None)] * missing
        dim = 0
        for item in items:
            if item is None:
                x = x.unsqueeze(dim)
            elif isinstance(item, int):
                x = x.select(dim, item)
                continue
            elif item != slice(None):
                x = torch.ops.aten.slice.Tensor(x, dim, item.start, item.stop, item.step or 1)
            dim += 1
        return x
