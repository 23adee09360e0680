"""Runs of the toy model on real ranks for tests of checkpoints, with their full state read by DeepSpeed's own
accessors.
"""

from __future__ import annotations

import resource
from dataclasses import dataclass, field, replace
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

from moe_dist.checkpoint import checkpoint
from moe_dist.checkpoint.init_from import init_from
from moe_dist.config.model_section import ModelConfig
from moe_dist.config.recipe import InitFrom
from moe_dist.core.errors import UserError
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout, make_layout
from moe_dist.training.deepspeed import init_distributed, make_engine
from tests.support.distributed import run_ranks
from tests.support.long import THREADS
from tests.support.selections import LOGITS, Selections, deviation, unite, watching
from tests.support.toy_model import EXPERTS, MOMA, TOKENS, VOCABULARY, ToyModel, make_config, objective, step_batches

BF16_LOGITS = 1e-2  # two layouts may round a weight or an activation to neighbouring numbers
MOMENTS = {"AdamW": ("exp_avg", "exp_avg_sq"), "SGD": ("momentum_buffer",)}
PARAMS = {"AdamW": {"lr": 0.05, "weight_decay": 0.1}, "SGD": {"lr": 0.5, "momentum": 0.9}}


@dataclass(frozen=True)
class Job:
    """Train the toy from step `start` to `stop`, after loading `load`; save to `save` before step `save_at`."""

    world: int = 2
    expert: int = 2
    stage: int = 1
    router: dict = field(default_factory=lambda: MOMA)
    optimizer: str = "AdamW"
    eps: float = 1e-3  # Adam's eps; at 1e-8 a gradient of the size of rounding would become a step of the size of lr
    bf16: bool = False
    gain: int = 3  # elements of one parameter
    transformer: bool = False  # train the real model, wide enough that its operations use several threads
    model: ModelConfig | None = None  # train the real model with this configuration
    trainable: tuple[str, ...] = ("*",)
    offload: bool = False
    wrapped: bool = False  # every name begins with `inner.`
    threads: int = THREADS
    start: int = 0
    stop: int = 0
    load: str | None = None
    init: InitFrom | None = None  # load it by init_from, as another stage
    used: bool = False  # load into an engine that has already trained something else
    save: str | None = None
    save_at: int = 0

    def resumed(self, **changes: Any) -> Job:
        """Return the job that resumes from this one's checkpoint."""
        return replace(self, **{"load": self.save, "start": self.save_at, "save": None} | changes)


@dataclass(frozen=True)
class Outcome:
    losses: list[float]
    norms: list[float]
    state: Any  # what checkpoint.load returned on rank 0, or init_from's account
    at_save: dict[str, Tensor]  # full state when it was saved (or loaded)
    at_end: dict[str, Tensor]
    selections: Selections  # of its steps


class CheckpointToy(ToyModel):
    """The toy model plus everything that is awkward to store: a parameter smaller than a rank's share, frozen ones, a
    buffer.
    """

    def __init__(self, router: dict, layout: Layout, gain: int):
        super().__init__(router, layout)
        generator = torch.Generator().manual_seed(0)
        self.gain = nn.Parameter(torch.ones(gain))
        self.tilt = nn.Parameter(1 + 0.1 * torch.randn(16, generator=generator), requires_grad=False)
        ids = self.ffn.experts.expert_ids
        everyone = torch.randn(EXPERTS, 5, generator=generator)
        self.base = nn.Parameter(everyone[list(ids)], requires_grad=False)
        self.base.expert_ids = ids  # type: ignore[attr-defined]
        self.register_buffer("calls", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("scratch", torch.randn(4, generator=generator), persistent=False)

    def forward(self, tokens_T, info):
        if self.training:
            self.calls += 1
        output = super().forward(tokens_T, info)
        return replace(output, logits_TV=output.logits_TV * self.gain.mean() * self.tilt.mean())


class Wrapped(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, tokens_T, info):
        return self.inner(tokens_T, info)


def run(job: Job, follow: Outcome | None = None) -> Outcome:
    """Run a job on `job.world` ranks. Unite the ranks' states, which must agree where ranks hold the same tensors.

    follow: select as that outcome did; the logits must agree (see tests/support/selections.py).
    """
    results = run_ranks(run_on_rank, job.world, job, follow.selections if follow is not None else None)
    selections = unite(result.selections for result in results)
    assert all(result.norms == results[0].norms for result in results), "ranks report different norms"
    if follow is not None:
        assert deviation(selections, follow.selections) < (BF16_LOGITS if job.bf16 else LOGITS)
    return replace(
        results[0],
        at_save=_unite([r.at_save for r in results]),
        at_end=_unite([r.at_end for r in results]),
        selections=selections,
    )


def build(job: Job):
    """Build engine and layout of a job. Collective. If the job loads a checkpoint, its weights are spoilt first, so
    that a missing load is noticed.
    """
    device = init_distributed()
    layout = make_layout(expert=job.expert, device=device)
    section = {
        "optimizer": {
            "type": job.optimizer,
            "params": PARAMS[job.optimizer] | ({"eps": job.eps} if job.optimizer == "AdamW" else {}),
        },
        "gradient_clipping": 0.5,
        "zero_optimization": {"stage": job.stage, "stage3_param_persistence_threshold": 100},
        "bf16": {"enabled": job.bf16},
    }
    if job.offload:
        section["zero_optimization"]["offload_optimizer"] = {"device": "cpu", "pin_memory": False}
    config = make_config(router=job.router, expert=job.expert, deepspeed=section, trainable=job.trainable)
    if job.model is not None:
        model: nn.Module = Transformer(job.model, VOCABULARY, layout, seed=0)
    elif job.transformer:
        ffn = config.model.ffn.model_copy(update={"hidden_size": 128})
        sizes = config.model.model_copy(update={"hidden_size": 128, "ffn": ffn})
        model = Transformer(sizes, VOCABULARY, layout, seed=0)
    else:
        model = CheckpointToy(job.router, layout, job.gain)
    if job.wrapped:
        model = Wrapped(model)
    if job.load is not None:
        for parameter in model.parameters():
            parameter.data.add_(7.0)
    return make_engine(model, config, layout), layout


def run_on_rank(rank: int, job: Job, follow: Selections | None = None) -> Outcome:
    torch.set_num_threads(job.threads)
    engine, layout = build(job)
    state = None
    at_save: dict[str, Tensor] = {}
    if job.used:
        engine.train_step(step_batches(9, rank, job.world, groups=4), objective, 0.01)
    if job.load is not None:
        state = checkpoint.load(job.load, engine, layout)
        at_save = account(engine, MOMENTS[job.optimizer] if job.start else ())
    if job.init is not None:
        state = init_from(job.init, engine, layout).to_json()
        at_save = account(engine, ())
    losses, norms, selections = [], [], {}
    for step in range(job.start, job.stop + 1):
        if job.save is not None and step == job.save_at:
            lanes = {str(lane): {"cursor": 100 * step + lane} for lane in range(rank, 4, job.world)}
            engine.skipped_steps = 3
            checkpoint.save(job.save, engine, layout, state={"step": step, "loader": {"lanes": lanes}})
            at_save = account(engine, MOMENTS[job.optimizer] if step else ())
        if step < job.stop:
            batches = step_batches(step, rank, job.world, groups=4, tokens=768 if job.transformer else TOKENS)
            with watching(follow) as watch:
                watch.step = step
                result = engine.train_step(batches, objective, 0.01)
            selections |= watch.seen
            losses.append(result.loss_sums["loss"])
            norms.append(result.grad_norm)
    assert engine.skipped_steps == (3 if job.load or job.save else 0)
    assert engine.steps == job.stop
    at_end = account(engine, MOMENTS[job.optimizer] if job.stop else ())
    return Outcome(losses, norms, state, at_save, at_end, selections)


def attempt_with_a_small_disk(rank: int, job: Job, limit: int) -> str | None:
    """Return the sentence of the UserError that ends the job, while rank 1 cannot write files over `limit` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
    try:
        return attempt(rank, job)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def attempt(rank: int, job: Job) -> str | None:
    """Return the sentence of the UserError that ends the job on this rank."""
    try:
        run_on_rank(rank, job)
    except UserError as error:
        return str(error)
    return None


def account(engine: Any, moments: tuple[str, ...]) -> dict[str, Tensor]:
    """Return every logical tensor in full, read by DeepSpeed's public accessors instead of ours: what a checkpoint must
    preserve.
    """
    if engine.zero_stage < 3 and moments:  # DeepSpeed links moments after the first group's step only: link them all
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found: dict[str, Tensor] = {}
    for name, param in engine.module.named_parameters():
        full = {}
        if param.requires_grad:
            full["master"] = safe_get_full_fp32_param(param)
            full |= {key: safe_get_full_optimizer_state(param, key) for key in moments}
        with deepspeed.zero.GatheredParameters([param], enabled=engine.zero_stage == 3):
            full["working"] = param.detach().clone()
        for kind, tensor in full.items():
            tensor = tensor.detach().clone()
            if hasattr(param, "expert_ids"):
                found |= {f"{kind} {name} of {e}": row for e, row in zip(param.expert_ids, tensor.unbind())}
            else:
                found[f"{kind} {name}"] = tensor
    found |= {name: buffer.clone() for name, buffer in engine.module.named_buffers() if not name.endswith("scratch")}
    return found


def _unite(accounts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    united: dict[str, Tensor] = {}
    for found in accounts:
        for name, tensor in found.items():
            assert torch.equal(united.setdefault(name, tensor), tensor), f"ranks differ in {name}"
    return united


def assert_same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Assert equal names, types and bits."""
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name
