"""One optimizer step over all ranks: DeepSpeed ZeRO 1, 2, 3 with experts, an exact loss and a true global norm.

The only file that imports DeepSpeed, which hands expert groups to ZeRO for its own MoE classes only: a thin subclass of
its engine does it for ours, over the groups of our layout.

A step follows the gradient of the objective, whose terms are sums divided by counts, both over all ranks and
micro-batches, clipped by the norm over all parameters, each expert counted once. DeepSpeed averages gradients over all
ranks, also those of experts (which the all-to-all has already summed over the expert-parallel ranks): so every rank's
part is scaled by the number of ranks, and nothing else.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
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
from moe_dist.core.batch import Batch
from moe_dist.core.errors import UserError
from moe_dist.core.expert_rows import is_stacked
from moe_dist.parallel.agreement import raise_on_all_ranks
from moe_dist.parallel.discovery import discover
from moe_dist.parallel.gpus import check_gpus
from moe_dist.parallel.layout import Layout
from moe_dist.training.deepspeed_config import accumulation_steps, to_deepspeed
from moe_dist.training.trainable import freeze_others


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one optimizer step did. The same on every rank, but for `records`."""

    loss_sums: dict[str, float]  # each metric of the objective, summed over all ranks and micro-batches
    counts: dict[str, int]  # what they are sums over, by the same names; "loss": the predictions that counted
    grad_norm: float  # over all parameters, before clipping; inf where it is not finite
    skipped: bool  # a loss or gradient was not finite: nothing was changed
    records: tuple[Any, ...]  # this rank's routing records of the last micro-batch
    depths: tuple[Any, ...]  # and what mixture-of-depths admitted in it


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
    accumulation = accumulation_steps(config.train, layout.world)
    freeze_others(model, config.trainable)
    _mark_experts(model, layout)
    trained = [p for p in model.parameters() if p.requires_grad]
    logger.setLevel(section.log_level.upper())
    zero = _ZeroEngine(
        model,
        to_deepspeed(section, accumulation=accumulation, num_parameters=sum(p.numel() for p in trained)),
        lambda params: make_optimizer(params, section, config.schedule.peak_lr),
    )
    return Engine(zero, config, layout, accumulation)


class Engine:
    """A model under ZeRO: `train_step` and `eval_forward`. Every rank calls them together.

    `steps` and `skipped_steps` are part of a run's state: a checkpoint keeps them, a resumed run sets them.
    """

    def __init__(self, zero: _ZeroEngine, config: Config, layout: Layout, accumulation: int) -> None:
        self._zero = zero
        self._layout = layout
        self._train = config.train
        self.accumulation = accumulation

    @property
    def steps(self) -> int:
        """Optimizer steps taken, skipped ones included."""
        return self._zero.global_steps

    @steps.setter
    def steps(self, value: int) -> None:
        self._zero.global_steps = value

    @property
    def skipped_steps(self) -> int:
        return self._zero.skipped_steps

    @skipped_steps.setter
    def skipped_steps(self, value: int) -> None:
        self._zero.skipped_steps = value

    @property
    def module(self) -> nn.Module:
        return self._zero.module

    @property
    def optimizer(self) -> Any:
        """DeepSpeed's ZeRO optimizer; the torch optimizer of its partitions is `.optimizer.optimizer`."""
        return self._zero.optimizer

    @property
    def zero_stage(self) -> int:
        return int(self._zero.zero_optimization_stage())

    def train_step(self, micro_batches: Iterable[Batch], objective: Any, lr: float) -> StepResult:
        """Accumulate over this rank's micro-batches and take one optimizer step at learning rate `lr`.

        micro_batches may read data as it is iterated: what it raises on one rank is raised on all of them, before
        anything is computed. A loss or gradient that is not finite on any rank leaves parameters and optimizer as they
        were on all ranks; train.non_finite then decides whether the run stops (UserError) or goes on.
        """
        batches, counts = self._collect(micro_batches, objective)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sums: dict[str, Tensor] = {}
        records: tuple[Any, ...] = ()
        depths: tuple[Any, ...] = ()
        for batch in batches:
            batch = batch.to(self._layout.device)
            output = self._zero(batch.tokens_T, batch.info)
            result = objective(output, batch, counts)
            for name, value in result.sums.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double()
            records, depths = output.records, output.depths
            self._zero.backward(_poison(result.loss) * self._layout.world)
            self._zero.step()
        loss_sums = self._sum_over_ranks(sums)
        grad_norm = float(self._zero.get_global_grad_norm())
        skipped = not self._zero.was_step_applied()
        if skipped:
            self._stop_or_go_on(loss_sums)
        return StepResult(
            loss_sums=loss_sums,
            counts=counts,
            grad_norm=grad_norm,
            skipped=skipped,
            records=tuple(records),
            depths=tuple(depths),
        )

    @torch.no_grad()
    def eval_forward(self, batch: Batch) -> Any:
        """The model's output for one micro-batch of this rank, without gradients. Every rank takes part."""
        batch = batch.to(self._layout.device)
        self._zero.eval()
        try:
            return self.module(batch.tokens_T, batch.info)
        finally:
            self._zero.train()

    def _collect(self, micro_batches: Iterable[Batch], objective: Any) -> tuple[list[Batch], dict[str, int]]:
        """This rank's micro-batches, and the counts over all ranks: one all-reduce, which tells of a failed rank."""
        problem: Exception | None = None
        batches: list[Batch] = []
        try:
            batches = list(micro_batches)
            if len(batches) != self.accumulation:
                raise ValueError(f"{len(batches)} micro-batches were given for an accumulation of {self.accumulation}")
        except Exception as error:
            problem = error
        counted = [torch.tensor(objective.counts(batch)) for batch in batches]
        counts = sum(counted, torch.zeros(len(objective.names), dtype=torch.int64))
        total = torch.cat([counts, torch.tensor([int(problem is not None)])]).to(self._layout.device)
        dist.all_reduce(total, group=self._layout.dp_group)
        *totals, failed = total.tolist()
        if failed:
            with raise_on_all_ranks():
                if problem is not None:
                    raise problem
        named = dict(zip(objective.names, totals))
        if not named["loss"]:
            raise UserError("no token of this step's global batch carries a loss: check the loss mask of the data")
        return batches, named

    def _sum_over_ranks(self, sums: dict[str, Tensor]) -> dict[str, float]:
        names = sorted(sums)
        total = torch.stack([sums[name].reshape(()) for name in names])
        dist.all_reduce(total, group=self._layout.dp_group)
        return dict(zip(names, total.tolist()))

    def _stop_or_go_on(self, loss_sums: dict[str, float]) -> None:
        """Apply train.non_finite to a step that DeepSpeed skipped; all ranks hold the same figures and decide alike."""
        terms = [f"loss term '{name}'" for name, value in loss_sums.items() if not math.isfinite(value)]
        problem = f"step {self.steps}: the {' and '.join(terms) or 'gradient norm'} is not finite"
        if self._train.non_finite == "stop":
            raise UserError(f"{problem}; the step changed nothing (train.non_finite=skip would go on)")
        if self.skipped_steps > self._train.max_skipped:
            raise UserError(f"{problem}, and {self.skipped_steps} skipped steps are more than train.max_skipped")


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


def _poison(loss: Tensor) -> Tensor:
    """Give a loss that is not finite gradients that are not: the norm, which all ranks share, makes them all skip."""
    return loss * (loss.detach() * 0.0 + 1.0)
