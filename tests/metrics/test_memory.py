"""The formula of a rank's memory equals the bytes of all tensors that real engines hold."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import fields, replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_dist.config.inheritance import merge
from moe_dist.config.recipe import Config
from moe_dist.core.strict import validate
from moe_dist.metrics import memory
from moe_dist.metrics.memory import RankBytes, rank_bytes
from moe_dist.model.transformer import Transformer
from moe_dist.parallel.layout import Layout
from moe_dist.training import deepspeed
from moe_dist.training.trainable import freeze_others
from tests.support import checkpoint_jobs
from tests.support.checkpoint_jobs import Job
from tests.support.distributed import run_ranks
from tests.support.model_batches import LORA, LORA_EXPERTS, TOP_K, model_config
from tests.support.toy_model import VOCABULARY, objective, step_batches

LORA_MODEL = model_config(LORA_EXPERTS, lora=LORA)
STATEFUL = model_config(TOP_K | {"router": {"type": "deepseek_v3", "num_experts": 4, "top_k": 2}}, tie_embeddings=True)
DOWN, ROUTERS = ("*.experts.down",), ("*.router.*",)


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Return the bytes of the storages of tensors, by address."""
    kept = [t.untyped_storage() for t in tensors if isinstance(t, Tensor) and t.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in kept if storage.nbytes()}


def alive() -> dict[int, int]:
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, Tensor)]
    return storages([*tensors, *(tensor.grad for tensor in tensors if tensor.is_leaf)])


def inside(value: Any) -> Iterator[Any]:
    """Yield the tensors inside lists and dicts."""
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from inside(item)
    else:
        yield value


def held(engine: Any) -> dict[str, dict[int, int]]:
    """Return the storages of an engine by purpose. A storage that serves two purposes counts for the first."""
    zero, parameters = engine.optimizer, list(engine.module.parameters())
    flats = zero.fp32_partitioned_groups_flat if engine.zero_stage == 3 else zero.single_partition_of_fp32_groups
    working = {True: [], False: []}
    for parameter in parameters:
        working[parameter.requires_grad] += [parameter.data, getattr(parameter, "ds_tensor", None)]
    gradients = [[p.grad, getattr(p, "grad_accum", None)] for p in parameters] + [flat.grad for flat in flats]
    gradients += [zero.averaged_gradients, getattr(zero, "all_grad_tensors", {})]
    gradients += [getattr(zero, "grad_partitions_flat_buffer", None)]
    gradients += [bucket.buffer for bucket in zero.ipg_buckets.values()]
    found = {
        "parameters": storages(working[True]),
        "frozen": storages(working[False]),
        "buffers": storages(engine.module.buffers()),
        "masters": storages(flats),
        "moments": storages(inside(list(zero.optimizer.state.values()))),
        "gradients": storages(inside(gradients)),
    }
    seen: set[int] = set()
    for name, of_purpose in found.items():
        found[name] = {place: size for place, size in of_purpose.items() if place not in seen}
        seen |= of_purpose.keys()
    return found


def watch(engine: Any, look: Callable[[], None]) -> None:
    """Call `look` at the moments of a step in which most gradients are held."""
    zero = engine.optimizer
    places = [(engine._zero, "backward"), (zero, "step"), (zero.optimizer, "step")]
    names = ("_release_ipg_buffers", "get_flat_partition", "average_tensor", "partition_grads")
    for owner, name in [*places, *((zero, name) for name in names if hasattr(zero, name))]:
        setattr(owner, name, looking(getattr(owner, name), look))


def looking(function: Callable, look: Callable[[], None]) -> Callable:
    """Return a function that calls `look` before and after `function`."""

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        look()
        result = function(*args, **kwargs)
        look()
        return result

    return wrapped


def measured(rank: int, job: Job, settings: dict[str, Any]) -> tuple[RankBytes, dict[str, int], int]:
    """Return the formula's bytes, the bytes held by purpose, and the bytes of all other tensors, between two steps.

    settings: changes of the recipe's section deepspeed.
    """
    torch.set_num_threads(1)
    before, make_engine, formula = alive(), checkpoint_jobs.make_engine, []

    def predicting(model, config, layout):
        config = validate(Config, merge(config.model_dump(mode="json"), {"deepspeed": settings}), "test")
        with torch.device("meta"):
            whole = Transformer(model.config, VOCABULARY, Layout(), seed=0)
        freeze_others(whole, config.trainable)
        formula.append(rank_bytes(whole, layout, config.deepspeed))
        return make_engine(model, config, layout)

    checkpoint_jobs.make_engine = predicting
    try:
        engine, _ = checkpoint_jobs.build(job)
    finally:
        checkpoint_jobs.make_engine = make_engine
    peak = [0]
    engine.train_step(step_batches(0, rank, job.world, groups=4), objective, 0.01)
    watch(engine, lambda: peak.append(sum(held(engine)["gradients"].values())))
    engine.train_step(step_batches(1, rank, job.world, groups=4), objective, 0.01)
    found = held(engine)
    known = before.keys() | {place for of_purpose in found.values() for place in of_purpose}
    others = sum(size for place, size in alive().items() if place not in known)
    return formula[0], {name: sum(sizes.values()) for name, sizes in found.items()} | {"gradients": max(peak)}, others


def check(job: Job, *, upper: bool = False, **settings: Any) -> list[RankBytes]:
    """Compare formula and engine. ZeRO's padding and the optimizer's step, 4 bytes a group, may be added.

    upper: the formula of the gradients is an upper bound.
    """
    formulas = []
    for formula, found, others in run_ranks(measured, job.world, job, settings):
        assert others < 200, "every tensor is counted"
        assert formula.buffers == found["buffers"]
        for field in fields(formula):
            predicted, actual = getattr(formula, field.name), found[field.name]
            least = 0.9 * predicted if upper and field.name == "gradients" else predicted
            assert least <= actual <= predicted + 64 * job.world, (field.name, predicted, actual)
        formulas.append(formula)
    return formulas


FULL = Job(transformer=True)


FORMS = [(1, ("*",), "AdamW"), (2, (*DOWN, *ROUTERS), "SGD"), (2, ("*",), "AdamW")]  # EP, trainable, optimizer
FEW = {(0, False), (0, True), (1, True)}  # number of a form, bf16


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize(
    ("form", "bf16"),
    [
        pytest.param(FORMS[number], bf16, marks=() if (number, bf16) in FEW else pytest.mark.slow)
        for number in range(3)
        for bf16 in (False, True)
    ],
)
def test_the_formula_is_what_an_engine_holds(stage, bf16, form):
    expert, trainable, optimizer = form
    check(replace(FULL, stage=stage, bf16=bf16, expert=expert, trainable=trainable, optimizer=optimizer))


SMALL_PARAMETERS = {"stage3_param_persistence_threshold": 10**6, "stage3_model_persistence_threshold": 90_000}
SMALL_BUCKET = {"reduce_bucket_size": 70_000, "stage3_param_persistence_threshold": 20_000}


@pytest.mark.parametrize(
    ("stage", "settings"),
    [
        *((stage, {"data_types": {"grad_accum_dtype": "bf16"}}) for stage in (1, 2, 3)),
        *((stage, {"zero_optimization": SMALL_BUCKET}) for stage in (1, 2, 3)),
        (1, {"zero_optimization": {"overlap_comm": True}}),
        (3, {"zero_optimization": {"sub_group_size": 50_000, "stage3_param_persistence_threshold": 10**6}}),
        (3, {"zero_optimization": SMALL_PARAMETERS}),
    ],
    ids=str,
)
def test_settings_that_change_the_memory(stage, settings):
    check(replace(FULL, stage=stage, bf16=True), upper="bucket" in str(settings), **settings)


@pytest.mark.parametrize(("stage", "bf16"), [(1, True), (2, False), (3, True)])
def test_a_single_rank(stage, bf16):
    check(Job(world=1, expert=1, stage=stage, bf16=bf16, model=LORA_MODEL))


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("model", [LORA_MODEL, STATEFUL])
def test_adapters_tied_embeddings_and_buffers(model, stage):
    trainable = ("*lora*",) if model is LORA_MODEL else ROUTERS
    formula, _ = check(Job(expert=1, stage=stage, bf16=True, model=model, trainable=trainable))
    assert formula.frozen > formula.parameters and (formula.buffers > 0) == (model is STATEFUL)


def measured_with_small_groups(rank: int, job: Job) -> tuple[RankBytes, dict[str, int], int]:
    """Let DeepSpeed divide groups of experts at few elements."""
    split = deepspeed.split_params_into_different_moe_groups_for_optimizer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "EXPERT_GROUP", 300_000)
        patch.setattr(deepspeed, split.__name__, partial(split, max_group_size=300_000))
        return measured(rank, job, {})


def test_large_groups_of_experts():
    job = replace(FULL, stage=3, bf16=True, expert=1)
    for formula, found, _ in run_ranks(measured_with_small_groups, 2, job):
        assert formula.gradients <= found["gradients"] <= formula.gradients + 128
    assert formula.gradients < check(job)[0].gradients


def test_experts_that_are_copied_and_divided():
    check(replace(FULL, world=4, stage=3, bf16=True, trainable=DOWN))


@pytest.mark.parametrize("stage", [1, 3])
def test_frozen_weights_are_kept_once_in_the_working_precision(stage):
    """They are sharded with their experts, and over data parallelism by ZeRO-3. They have no master and no moment."""
    job = replace(FULL, stage=stage, bf16=True, trainable=ROUTERS)
    formula, _ = check(job)
    alone, _ = check(replace(job, stage=1, expert=1))
    experts = 2 * 2 * 4 * 3 * 128 * 128  # bf16, 2 layers, 4 experts, 3 matrices
    dense = alone.frozen - experts
    kept = 2 * 2 * 4 * 64  # the small norms of queries and keys, which ZeRO-3 also keeps whole
    assert formula.frozen == (experts + dense) // 2 + kept if stage == 3 else experts // 2 + dense
    assert formula.masters + formula.moments == 12 * 2 * 4 * 128 // 2  # four columns of width 128 in each of two layers
