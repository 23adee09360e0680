"""Null assignments cost no row, FLOP or byte, in one process and over expert-parallel ranks."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from moe_dist.parallel import collectives
from moe_dist.parallel.layout import make_layout
from tests.support.distributed import run_ranks
from tests.support.moe_cases import EXPERT_WIDTH, WIDTH, make_batch, make_layer

FLOPS_OF_A_ROW = 2 * 3 * WIDTH * EXPERT_WIDTH  # gate, up, down


def forward_costs(rank, router, world, only_nulls=False):
    """Return [true assignments, null assignments, numbers sent, FLOPs] of this rank's micro-batch."""
    layer = make_layer(router, layout=make_layout(expert=world, device=torch.device("cpu")))
    x_TD, info, _ = make_batch("mixed", rank)
    if only_nulls:
        with torch.no_grad():
            x_TD.abs_()
            layer.router.gate.weight.abs_()[:8].mul_(-1)
    sent = []

    def counting(received, x_S, *args, **kwargs):
        sent.append(x_S.numel())
        return dist.all_to_all_single(received, x_S, *args, **kwargs)

    experts_only = FlopCounterMode(display=False)
    experts = layer.experts.forward
    with mock.patch.object(collectives, "dist", mock.Mock(all_to_all_single=counting)):

        def counted(*args):
            with experts_only:
                return experts(*args)

        layer.experts.forward = counted
        _, record = layer(x_TD, info)
    (part,) = record.routings
    true = int(part.kept_VE.sum())
    return true, int(part.chosen_VC.sum()) - true, sum(sent), experts_only.get_total_flops()


@pytest.mark.parametrize("world", [1, 2])
def test_null_assignments_cost_nothing(world):
    results = run_ranks(forward_costs, world, "null", world)
    assert all(true > 10 and nulls > 10 for true, nulls, *_ in results), "there is nothing to compare"
    rows = sum(true for true, *_ in results)
    # Over ranks every true assignment travels once as a row with its weight and once home, its expert near or far.
    assert sum(sent for *_, sent, _ in results) == (rows * (2 * WIDTH + 1) if world > 1 else 0)
    assert sum(flops for *_, flops in results) == rows * FLOPS_OF_A_ROW


def test_tokens_that_choose_nulls_alone_cost_nothing_at_all():
    for true, nulls, sent, flops in run_ranks(forward_costs, 2, "null", 2, True):
        assert nulls > 30
        assert (true, sent, flops) == (0, 0, 0)
