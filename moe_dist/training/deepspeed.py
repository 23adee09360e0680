"""DeepSpeed ZeRO stages 1, 2 and 3 for models with experts. This is the only file that imports DeepSpeed.

DeepSpeed passes the process groups of experts to ZeRO only for its own MoE classes. A thin subclass of DeepSpeed's
engine does the same for our experts, using the groups of our layout. This file also chooses the optimizer and the
parameters that get weight decay. The optimizer step is computed in training/engine.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine
from deepspeed.runtime.utils import register_output_backward_hooks
from deepspeed.utils import groups, logger
from torch import Tensor, nn

from moe_dist.config.deepspeed_section import DeepSpeedSection
from moe_dist.config.recipe import Config
from moe_dist.core.expert_rows import is_stacked
from moe_dist.core.initial_values import all_new, give_memory, on_meta
from moe_dist.parallel.discovery import discover
from moe_dist.parallel.gpus import check_gpus
from moe_dist.parallel.layout import Layout
from moe_dist.parallel.meeting import meet
from moe_dist.parallel.signals import StopSignals
from moe_dist.training.deepspeed_config import accumulation_steps, to_deepspeed
from moe_dist.training.engine import Engine
from moe_dist.training.trainable import freeze_others


def init_distributed(stop: StopSignals | None = None) -> torch.device:
    """Find this process's rank (parallel/discovery.py), start torch.distributed, and return the device. Collective.

    Raises UserError on every rank if ranks share a GPU (parallel/gpus.py). Raises Stopped if `stop` has received a
    signal and the other ranks do not connect in time (parallel/meeting.py).
    """
    # DeepSpeed calls collectives by their deprecated names, thousands of times.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    # DeepSpeed would compile a C++ extension for inference here. If a killed run left a lock file, it would hang.
    deepspeed.ops.__compatible_ops__ = {}
    accelerator = get_accelerator()
    place = discover()
    # If each task sees only its own GPU (srun --gpus-per-task), that GPU is number 0.
    place = replace(place, local_rank=place.local_rank % max(accelerator.device_count(), 1))
    place.export()
    accelerator.set_device(place.local_rank)
    device = torch.device(accelerator.current_device_name())
    met = meet(place, stop or StopSignals())
    store = check_gpus(place, device)
    deepspeed.init_distributed(accelerator.communication_backend_name(), auto_mpi_discovery=False, verbose=False)
    del met, store
    return device


def make_engine(model: nn.Module, config: Config, layout: Layout, is_new: Callable[[str], bool] = all_new) -> Engine:
    """Wrap a model in DeepSpeed's ZeRO and return its Engine. Collective.

    Parameters that config.trainable does not match are frozen. The learning rate is an argument of each optimizer step
    (Engine.train_step). Raises UserError if the batch sizes do not fit the number of ranks, or if a pattern in
    config.trainable matches no parameter.

    model: if it was built on the meta device, its parameters are created here, in the dtype that training uses. Those
    for which `is_new` returns False will be loaded and get no initial values.
    """
    section = config.deepspeed
    accumulation = accumulation_steps(config.train, layout.dp)
    freeze_others(model, config.trainable)
    _mark_experts(model, layout)
    trained = [p for p in model.parameters() if p.requires_grad]
    logger.setLevel(section.log_level.upper())
    of_optimizer = parameter_groups(model)  # now, because sharded parameters have lost their shapes
    settings = to_deepspeed(section, accumulation=accumulation, num_parameters=sum(p.numel() for p in trained))
    if on_meta(model):
        dtype = torch.bfloat16 if section.bf16.enabled else torch.float32
        shard = _sharder(settings, dtype, layout) if section.zero_optimization.stage == 3 else None
        give_memory(model, layout.device, dtype, is_new=is_new, shard=shard)
    zero = _ZeroEngine(
        model, of_optimizer, settings, lambda params: make_optimizer(params, section, config.schedule.peak_lr)
    )
    return Engine(zero, config.train, layout, accumulation)


def _sharder(settings: dict[str, Any], dtype: torch.dtype, layout: Layout) -> Callable[[nn.Parameter], None]:
    """Return a collective function that shards one parameter for ZeRO-3, so that this rank keeps only its piece.

    An expert is sharded over the ranks that hold copies of it. Any other parameter is sharded over all ranks. Unlike
    DeepSpeed's own conversion, the function does not broadcast the parameter, because all copies of a parameter have
    the same initial values.
    """
    init = deepspeed.zero.Init(config_dict_or_path=settings, dtype=dtype)

    def shard(parameter: nn.Parameter) -> None:
        if is_stacked(parameter):
            parameter.ds_zero_partition_process_group = layout.edp_group  # type: ignore[attr-defined]
        init._convert_to_deepspeed_param(parameter)
        parameter.partition()  # type: ignore[attr-defined]

    return shard


class _ZeroEngine(DeepSpeedEngine):
    """DeepSpeed's engine, adapted so that it treats our experts as MoE layers."""

    def __init__(
        self, model: nn.Module, parameters: list[dict[str, Any]], config: dict[str, Any], optimizer: Any
    ) -> None:
        super().__init__(
            args=None,
            model=model,
            optimizer=optimizer,
            model_parameters=parameters,
            config=config,
            config_class=DeepSpeedConfig(config),
        )

    def _configure_distributed_model(self, model: nn.Module) -> None:
        super()._configure_distributed_model(model)
        # If this is set, stages 1 and 2 require a parameter group of experts in the optimizer, so only trained experts
        # count. Stage 3 must place frozen experts as well.
        self.has_moe_layers = any(
            is_stacked(parameter) and (parameter.requires_grad or self.zero_optimization_partition_weights())
            for parameter in model.parameters()
        )

    def _validate_zero3_moe_compatibility(self) -> None:
        """Skip DeepSpeed's check, which rejects MoE layers in stage 3 unless they are DeepSpeed's own AutoEP layers.

        Stage 3 also works with our experts, because they are marked in the same way as AutoEP layers (_mark_experts).
        """

    def _configure_zero_optimizer(self, optimizer: Any) -> Any:
        # DeepSpeed checks every gradient for inf and nan (11 launches per parameter, a collective and a host sync), and
        # then their float64 norm. Any inf or nan also makes this norm inf or nan, so checking the norm is enough.
        zero = super()._configure_zero_optimizer(optimizer)
        zero.check_overflow = zero.update_offload_overflow_tracker = _check_nothing
        return zero

    def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> str:
        """Return the kind of optimizer that DeepSpeed creates. It is the same ZeRO optimizer for every dtype.

        Without this override, DeepSpeed would use another class for bf16 in stage 1. The state of that class has a
        different layout.
        """
        return ZERO_OPTIMIZATION

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed prepares backward with hooks on the tensors that a model returns. Our model returns them inside
        # a record, where DeepSpeed does not find them, so the hook is put on the loss.
        register_output_backward_hooks(loss, self._backward_prologue)
        super().backward(loss, scale_wrt_gas=False)


def _check_nothing(*arguments: Any, **settings: Any) -> None:
    """Do nothing. This replaces DeepSpeed's check for inf and nan, because the gradient norm is checked instead."""


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Divide the trainable parameters into those with and those without weight decay.

    Matrices (including embeddings, routers and experts) get weight decay; vectors (norms and biases) do not. The
    leading dimension of a stacked expert parameter is ignored here: a stack of vectors gets no weight decay.
    """
    decay: list[nn.Parameter] = []
    no_decay: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            is_vector = parameter.dim() - is_stacked(parameter) < 2
            (no_decay if is_vector else decay).append(parameter)
    named = [{"name": "decay", "params": decay}, {"name": "no_decay", "params": no_decay, "weight_decay": 0.0}]
    split = split_params_into_different_moe_groups_for_optimizer(named)
    return [group for group in split if group["params"]]


def make_optimizer(params: list[dict[str, Any]], section: DeepSpeedSection, lr: float) -> torch.optim.Optimizer:
    """Create the torch optimizer for ZeRO's flat partitions.

    Adam and AdamW use torch's fused version, which also runs on CPU and therefore works with offloading.
    """
    settings = section.optimizer.params.model_dump() | {"lr": lr}
    if section.optimizer.type == "SGD":
        return torch.optim.SGD(params, **settings)
    decoupled = settings.pop("adam_w_mode") or section.optimizer.type == "AdamW"
    return (torch.optim.AdamW if decoupled else torch.optim.Adam)(params, fused=True, **settings)


def _mark_experts(model: nn.Module, layout: Layout) -> None:
    """Mark expert parameters for DeepSpeed, and register the two process groups of expert parallelism.

    The experts are divided among the ranks of layout.ep_group. The ranks of layout.edp_group hold copies of the same
    experts.
    """
    name = f"ep_size_{layout.expert}"
    marks = {"allreduce": False, "group_name": name}
    marks |= {"ds_zero_placement_family": "autoep_expert", "ds_zero_partition_group_name": name}  # stage 3
    for parameter in model.parameters():
        if is_stacked(parameter):
            for key, value in marks.items():
                setattr(parameter, key, value)
    for table, ranks, group in (
        (groups._EXPERT_PARALLEL_GROUP, groups._EXPERT_PARALLEL_GROUP_RANKS, layout.ep_group),
        (groups._EXPERT_DATA_PARALLEL_GROUP, groups._EXPERT_DATA_PARALLEL_GROUP_RANKS, layout.edp_group),
    ):
        table[name] = group
        ranks[name] = dist.get_process_group_ranks(group)
