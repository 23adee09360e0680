"""Initial values of parameters and buffers. A tensor is filled with them as soon as it has memory.

A large model is built on the meta device, where its tensors have no memory. `set_initial` then only remembers how to
fill a tensor, and `give_memory` later creates and fills the tensors one after another. In a model that is built on a
real device, `set_initial` fills the tensor at once. The values are the same in both cases.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Fill = Callable[[Tensor], object]

_ATTRIBUTE = "fill_with_initial_values"
_NORMS = (nn.RMSNorm, nn.LayerNorm)


@torch.no_grad()
def set_initial(tensor: Tensor, fill: Fill) -> None:
    """Fill a parameter or buffer with its initial values.

    If the tensor is on the meta device, only remember `fill`. `give_memory` will then fill the tensor.
    """
    if tensor.is_meta:
        setattr(tensor, _ATTRIBUTE, fill)
    else:
        fill(tensor)


def constant_(tensor: Tensor, value: float) -> None:
    """Use `value` as the initial value of every element of a parameter or buffer."""
    set_initial(tensor, lambda target: target.fill_(value))


def all_new(name: str) -> bool:
    """Return True. Use this function as `is_new` of give_memory if every tensor needs its initial values."""
    return True


def none_new(name: str) -> bool:
    """Return False. Use this function as `is_new` of give_memory if every tensor will be loaded."""
    return False


def on_meta(model: nn.Module) -> bool:
    """Return True if any parameter of the model is on the meta device."""
    return any(parameter.is_meta for parameter in model.parameters())


@torch.no_grad()
def give_memory(
    model: nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    *,
    is_new: Callable[[str], bool],
    shard: Callable[[nn.Parameter], object] | None = None,
) -> None:
    """Create the parameters and buffers of a model that was built on the meta device, one after another.

    dtype: the dtype of all parameters. Buffers keep their own dtypes.
    is_new: a function that takes a tensor's name and returns True if the tensor needs its initial values. The other
    tensors are filled with zeros, because they will be loaded.
    shard: a function that replaces a parameter's data with a smaller copy. If given, it is called with each parameter
    as soon as the parameter is filled. All parameters are then filled in the same scratch memory, so only one whole
    parameter is in memory at a time.

    Parameters stay the same Python objects, so shared parameters stay shared and references to them stay valid. Raises
    RuntimeError if a tensor has no initial values.
    """
    for name, buffer in [item for item in model.named_buffers() if item[1].is_meta]:
        made = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
        fill = _initial(model, name, buffer)
        fill(made) if is_new(name) else made.zero_()
        torch.utils.swap_tensors(buffer, made)
    largest = max(parameter.numel() for parameter in model.parameters())
    whole = None if shard is None else torch.empty(largest, dtype=dtype, device=device)
    for name, parameter in model.named_parameters():
        fill, shape = _initial(model, name, parameter), parameter.shape
        values = torch.empty(shape, dtype=dtype, device=device) if whole is None else whole[: shape.numel()].view(shape)
        made_parameter = nn.Parameter(values, requires_grad=parameter.requires_grad)
        made_parameter.__dict__.update(parameter.__dict__)
        torch.utils.swap_tensors(parameter, made_parameter)
        fill(parameter) if is_new(name) else parameter.zero_()
        if shard is not None:
            shard(parameter)


def _initial(model: nn.Module, name: str, tensor: Tensor) -> Fill:
    """Return the function that fills a tensor with its initial values.

    PyTorch's norms do not call set_initial. Their weights are set to 1 and their biases to 0.
    """
    fill: Fill | None = getattr(tensor, _ATTRIBUTE, None)
    path, _, key = name.rpartition(".")
    if fill is None and isinstance(model.get_submodule(path), _NORMS):
        return lambda target: target.fill_(1.0 if key == "weight" else 0.0)
    if fill is None:
        raise RuntimeError(f"'{name}' has no initial values: its module must call set_initial, constant_ or Site.draw")
    return fill
