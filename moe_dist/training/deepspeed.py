"""DeepSpeed ZeRO 1, 2, 3 with experts. The only file that imports DeepSpeed.

DeepSpeed hands expert groups to ZeRO for its own MoE classes only: a thin subclass of its engine does it for ours, over
the groups of our layout. What a step computes is in training/engine.py.
"""

from __future__ import annotations

import warnings
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
from moe_dist.parallel.discovery import discover
from moe_dist.parallel.gpus import check_gpus
from moe_dist.parallel.layout import Layout
from moe_dist.training.deepspeed_config import accumulation_steps, to_deepspeed
from moe_dist.training.engine import Engine
from moe_dist.training.trainable import freeze_others


def init_distributed() -> torch.device:
    """Find this process's place (see parallel/discovery.py), start torch.distributed, and return the rank's device.

    Raises UserError on every rank if ranks share a GPU (see parallel/gpus.py).
    """
    # DeepSpeed calls collectives by names that torch has renamed, thousands of times.
    warnings.filterwarnings("ignore", message="`torch.distributed.*is deprecated", category=FutureWarning)
    # It would compile a C++ extension for inference here, and wait for ever where a killed run has left a lock file.
    deepspeed.ops.__compatible_ops__ = {}
    accelerator = get_accelerator()
    place = discover()
    # Where each task sees its own GPU only (srun --gpus-per-task), that one is number 0.
    place = replace(place, local_rank=place.local_rank % max(accelerator.device_count(), 1))
    place.export()
    accelerator.set_device(place.local_rank)
    device = torch.device(accelerator.current_device_name())
    store = check_gpus(place, device)
    deepspeed.init_distributed(accelerator.communication_backend_name(), auto_mpi_discovery=False, verbose=False)
    del store
    return device


def make_engine(model: nn.Module, config: Config, layout: Layout) -> Engine:
    """Hand a model to ZeRO. Collective. The learning rate is each step's.

    Freezes what config.trainable does not name. Raises UserError for what the recipe gets wrong.
    """
    section = config.deepspeed
    accumulation = accumulation_steps(config.train, layout.dp)
    freeze_others(model, config.trainable)
    _mark_experts(model, layout)
    trained = [p for p in model.parameters() if p.requires_grad]
    logger.setLevel(section.log_level.upper())
    zero = _ZeroEngine(
        model,
        to_deepspeed(section, accumulation=accumulation, num_parameters=sum(p.numel() for p in trained)),
        lambda params: make_optimizer(params, section, config.schedule.peak_lr),
    )
    return Engine(zero, config.train, layout, accumulation)


class _ZeroEngine(DeepSpeedEngine):
    """DeepSpeed's engine with our experts: it finds has_moe_layers where it looks for its own MoE classes."""

    def __init__(self, model: nn.Module, config: dict[str, Any], optimizer: Any) -> None:
        super().__init__(
            args=None,
            model=model,
            optimizer=optimizer,
            model_parameters=parameter_groups(model),
            config=config,
            config_class=DeepSpeedConfig(config),
        )

    def _configure_distributed_model(self, model: nn.Module) -> None:
        super()._configure_distributed_model(model)
        # Stages 1 and 2 insist on a group of experts in the optimizer; stage 3 must place frozen experts as well.
        self.has_moe_layers = any(
            is_stacked(parameter) and (parameter.requires_grad or self.zero_optimization_partition_weights())
            for parameter in model.parameters()
        )

    def _validate_zero3_moe_compatibility(self) -> None:
        """DeepSpeed admits only its AutoEP layers to stage 3; our expert parameters are marked as theirs are."""

    def _configure_zero_optimizer(self, optimizer: Any) -> Any:
        # DeepSpeed looks for inf and nan in every gradient (11 launches a parameter, a collective and a read), and then
        # in their float64 norm, which any of them makes inf or nan. The norm decides alone.
        zero = super()._configure_zero_optimizer(optimizer)
        zero.check_overflow = zero.update_offload_overflow_tracker = _check_nothing
        return zero

    def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> str:
        """One optimizer class a stage: DeepSpeed would switch bf16 at stage 1 to a class of other layout."""
        return ZERO_OPTIMIZATION

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed prepares it from hooks on the tensors that a model returns; ours returns them inside a record.
        register_output_backward_hooks(loss, self._backward_prologue)
        super().backward(loss, scale_wrt_gas=False)


def _check_nothing(*arguments: Any, **settings: Any) -> None:
    """Stand-in for DeepSpeed's search for inf and nan."""


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for matrices (embeddings, routers and experts included), none for vectors (norms and biases).

    An expert's parameters are stacked, so theirs have one dimension more.
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
    """torch's optimizer for ZeRO's flat partitions; the fused Adam runs on CPU (offloading too) and on GPU."""
    settings = section.optimizer.params.model_dump() | {"lr": lr}
    if section.optimizer.type == "SGD":
        return torch.optim.SGD(params, **settings)
    decoupled = settings.pop("adam_w_mode") or section.optimizer.type == "AdamW"
    return (torch.optim.AdamW if decoupled else torch.optim.Adam)(params, fused=True, **settings)


def _mark_experts(model: nn.Module, layout: Layout) -> None:
    """Tell DeepSpeed which parameters are an expert's and which ranks share them."""
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
