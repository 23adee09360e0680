"""A rank's part of the model and optimizer, as fragments of logical tensors.

A logical tensor is a whole tensor as a single rank would hold it, so it does not depend on the layout.

  master/NAME   fp32 master weights of a trainable parameter
  MOMENT/NAME   a moment of the optimizer (exp_avg, exp_avg_sq, momentum_buffer, ...) for this parameter
  frozen/NAME   a frozen parameter in its own dtype
  buffer/NAME   a buffer in its own dtype

Each row of a stacked expert parameter is a separate logical tensor. Its NAME ends with [global expert id], so a later
run may place any expert on any rank.

This is the only file in checkpoint/ that depends on ZeRO's internals. In stages 1 and 2, ZeRO flattens the parameters
of a group and splits them into one contiguous fp32 partition per rank. In stage 3, it splits every parameter into equal
pieces. The last partition or piece ends in padding, which belongs to no fragment.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_dist.checkpoint.storage import Fragment
from moe_dist.core.expert_rows import expert_ids, row_name, rows_between
from moe_dist.core.step import ShardedModel

MASTER, FROZEN, BUFFER = MODEL_KINDS = "master", "frozen", "buffer"  # all other kinds are moments


class _Piece(NamedTuple):
    """The piece of one parameter that ZeRO keeps on this rank.

    The piece consists of elements [start, start + numel) of the flattened parameter. ZeRO keeps them in `flat`,
    beginning at flat_start.
    """

    name: str
    param: nn.Parameter
    start: int
    numel: int
    flat: Tensor  # an fp32 partition, which the base optimizer updates
    flat_start: int


def fragments(engine: ShardedModel) -> list[Fragment]:
    """Return this rank's part of the model and optimizer as fragments.

    The fragments are views of the live tensors: a save reads their values, and a load overwrites them.
    """
    found: list[Fragment] = []
    for name, param, start, numel, flat, flat_start in _pieces(engine):
        for kind, tensor in {MASTER: flat.detach(), **_moments(engine, flat)}.items():
            found += _logical(f"{kind}/{name}", param, start, tensor.narrow(0, flat_start, numel))
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            start, values = _frozen_values(param)
            found += _logical(f"{FROZEN}/{name}", param, start, values)
    buffers = dict(engine.module.named_buffers())
    persistent = engine.module.state_dict(keep_vars=True) if buffers else {}
    for name, buffer in buffers.items():
        if name in persistent:
            found += _logical(f"{BUFFER}/{name}", buffer, 0, buffer.view(-1))
    return found


def kind_of(name: str) -> str:
    """Return the kind of a logical tensor, which is the part of its name before the first slash."""
    return name.split("/", 1)[0]


def moment_names(engine: ShardedModel) -> set[str]:
    """Return the names of the optimizer's moments. The set is empty before the optimizer's first step."""
    return {name for flat in _flats(engine) for name in _moments(engine, flat)}


def optimizer_scalars(engine: ShardedModel) -> dict[str, float]:
    """Return the optimizer's scalar state, such as Adam's step.

    Raises RuntimeError if a scalar differs between this rank's partitions.
    """
    states = [_state(engine, flat) for flat in _flats(engine)]
    states += [{"step": group["step"]} for group in _base(engine).param_groups if "step" in group]
    scalars: dict[str, float] = {}
    for state in states:
        for key, value in state.items():
            is_scalar = value.dim() == 0 if isinstance(value, Tensor) else isinstance(value, int | float)
            if is_scalar and scalars.setdefault(key, float(value)) != float(value):
                raise RuntimeError(f"the optimizer's partitions disagree on '{key}': {scalars[key]}, {float(value)}")
    return scalars


def set_optimizer_scalars(engine: ShardedModel, scalars: dict[str, float]) -> None:
    """Set the optimizer's scalar state, such as Adam's step, in every partition and parameter group that has it."""
    for state in [*(_state(engine, flat) for flat in _flats(engine)), *_base(engine).param_groups]:
        for key, value in scalars.items():
            if isinstance(state.get(key), Tensor):
                state[key].fill_(value)
            elif key in state:
                state[key] = type(state[key])(value)


@torch.no_grad()
def reset_optimizer(engine: ShardedModel, *, with_moments: bool) -> None:
    """Clear the optimizer's state. If with_moments is true, also create the moments, so that a load can fill them.

    The moments are created by an optimizer step with zero gradients and learning rate zero. This step also advances
    scalars such as Adam's step, so load the checkpoint afterwards.
    """
    base, flats = _base(engine), _flats(engine)
    base.state.clear()
    if not with_moments:
        return
    rates = [group["lr"] for group in base.param_groups]
    gradients = [flat.grad for flat in flats]  # with offload these buffers are reused later
    for group in base.param_groups:
        group["lr"] = 0.0
    for flat in flats:
        flat.grad = torch.zeros_like(flat)
    if engine.zero_stage == 3:
        for index in range(len(flats)):
            engine.optimizer._optimizer_step(index)
    else:
        base.step()
    for flat, gradient in zip(flats, gradients):
        flat.grad = gradient
    for group, rate in zip(base.param_groups, rates):
        group["lr"] = rate


@torch.no_grad()
def refresh_working_parameters(engine: ShardedModel) -> None:
    """Copy the fp32 masters to the parameters that the forward pass uses, as ZeRO does after a step. Collective."""
    zero = engine.optimizer
    if engine.zero_stage != 3:
        zero.update_lp_params()
        return
    zero._partition_all_parameters()  # gathered copies are stale: drop them
    for index in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(index)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)


def _pieces(engine: ShardedModel) -> Iterator[_Piece]:
    zero = engine.optimizer
    if engine.zero_stage == 3:
        name_of = {id(param): name for name, param in engine.module.named_parameters()}
        for group, flat in zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat):
            flat_start = 0
            for param in group:
                start, numel = _stage3_range(param)
                yield _Piece(name_of[id(param)], param, start, numel, flat, flat_start)
                flat_start += param.partition_numel()
        return
    for name, param in engine.module.named_parameters():
        mapping = getattr(param, "_hp_mapping", None)  # None: no part of it is in this rank's partition
        if mapping is not None:
            flat = _base(engine).param_groups[mapping.param_group_index]["params"][0]
            held, kept = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield _Piece(name, param, held.start, held.numel, flat, kept.start)


def _stage3_range(param: Any) -> tuple[int, int]:
    """Return the start and length of this rank's piece of a parameter under ZeRO stage 3.

    Both are in elements of the flattened parameter. The length does not include padding.
    """
    size = param.partition_numel()
    start = min(dist.get_rank(param.ds_process_group) * size, param.ds_numel)
    return start, min(size, param.ds_numel - start)


def _frozen_values(param: Any) -> tuple[int, Tensor]:
    if not hasattr(param, "ds_tensor"):
        return 0, param.detach().view(-1)  # equal on every rank that has it; DCP lets one of them write it
    start, numel = _stage3_range(param)
    return start, param.ds_tensor.detach().view(-1).narrow(0, 0, numel)


def _logical(name: str, owner: Any, start: int, values: Tensor) -> Iterator[Fragment]:
    """Yield the fragments that cover a range of a flattened parameter or buffer.

    owner: the parameter or buffer. values: the elements of the range, which begins at `start`. If the owner is a
    stacked expert parameter, there is one fragment per expert in the range.
    """
    shape, stop = tuple(getattr(owner, "ds_shape", owner.shape)), start + values.numel()
    ids = expert_ids(owner)
    if ids is None:
        if values.numel():
            yield Fragment(name, shape, start, values)
        return
    for expert, first, part in rows_between(ids, shape, start, stop):
        yield Fragment(row_name(name, expert), shape[1:], first, values[part])


def _base(engine: ShardedModel) -> Any:
    """Return the PyTorch optimizer that ZeRO wraps."""
    return engine.optimizer.optimizer


def _flats(engine: ShardedModel) -> list[Tensor]:
    """Return this rank's fp32 partitions.

    In stage 3, the wrapped optimizer holds the partitions only during a step. They are therefore read from ZeRO itself.
    """
    if engine.zero_stage == 3:
        return list(engine.optimizer.fp32_partitioned_groups_flat)
    return [param for group in _base(engine).param_groups for param in group["params"]]


def _state(engine: ShardedModel, flat: Tensor) -> dict[str, Any]:
    return _base(engine).state.get(flat, {})


def _moments(engine: ShardedModel, flat: Tensor) -> dict[str, Tensor]:
    state = _state(engine, flat)
    return {key: value for key, value in state.items() if isinstance(value, Tensor) and value.shape == flat.shape}
