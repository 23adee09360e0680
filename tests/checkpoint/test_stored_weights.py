"""A model that will not be trained is filled from a checkpoint in any layout, frozen parameters and buffers too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_dist.checkpoint.stored_weights import fill_model
from moe_dist.core.errors import UserError
from moe_dist.parallel.layout import make_layout
from tests.support.checkpoint_jobs import CheckpointToy, Job
from tests.support.distributed import run_ranks


def filled(rank: int, job: Job, extra: str = "", lacks: str = "") -> dict[str, Tensor] | str:
    """Fill a corrupted toy model. Return this rank's tensors, expert by expert, or the UserError's sentence."""
    layout = make_layout(expert=job.expert, device=torch.device("cpu"))
    model = CheckpointToy(job.router, layout, job.gain)
    for tensor in (*model.parameters(), model.calls):
        tensor.data.add_(7)
    if extra:
        model.register_buffer(extra, torch.zeros(1))
    if lacks:
        delattr(model, lacks)
    try:
        fill_model(model, job.save, layout)
    except UserError as error:
        return str(error)
    found = {"calls": model.calls}
    for name, parameter in model.named_parameters():
        ids = getattr(parameter, "expert_ids", None)
        rows = {"": parameter} if ids is None else {f" of {e}": row for e, row in zip(ids, parameter, strict=True)}
        found |= {f"working {name}{end}": row.detach() for end, row in rows.items()}
    return found


@pytest.mark.parametrize(("world", "expert"), [(1, 1), (2, 2), (2, 1)])
def test_everything_is_the_stored_one(world, expert, saved):
    job, outcome = saved
    wanted = {name: value for name, value in outcome.at_save.items() if name.partition(" ")[0] in ("working", "calls")}
    assert int(wanted["calls"][0]) > 0
    results = run_ranks(filled, world, replace(job, world=world, expert=expert))
    for found in results:
        assert len(found) == len(wanted) or expert > 1
        for name, value in found.items():
            assert value.dtype == wanted[name].dtype and torch.equal(value, wanted[name]), name
    assert set().union(*results) == wanted.keys()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"extra": "bias"}, "is a checkpoint of another model: 'bias' is missing, not [1]"),
        ({"lacks": "tilt"}, "is a checkpoint of another model: the model has no 'tilt'"),
        ({"lacks": "base"}, "is a checkpoint of another model: the model has no 'base["),
    ],
)
def test_another_model_is_refused_on_every_rank(changes, sentence, saved):
    job, _ = saved
    for refused in run_ranks(filled, 2, job, *[changes.get(key, "") for key in ("extra", "lacks")]):
        assert isinstance(refused, str) and sentence in refused, refused
