"""Process groups of a layout, on real ranks."""

import pytest
import torch
import torch.distributed as dist

from moe_dist.core.errors import UserError
from moe_dist.parallel.layout import make_layout
from tests.support.distributed import run_ranks


def _groups(rank, expert):
    layout = make_layout(expert=expert, device=torch.device("cpu"))
    return [dist.get_process_group_ranks(group) for group in (layout.ep_group, layout.edp_group, layout.dp_group)]


def test_expert_parallel_groups_are_neighbours():
    assert run_ranks(_groups, 4, 2) == [
        [[0, 1], [0, 2], [0, 1, 2, 3]],
        [[0, 1], [1, 3], [0, 1, 2, 3]],
        [[2, 3], [0, 2], [0, 1, 2, 3]],
        [[2, 3], [1, 3], [0, 1, 2, 3]],
    ]


def test_a_failing_rank_is_reported_and_the_pool_recovers():
    with pytest.raises(RuntimeError, match=r"parallel.expert=3 does not divide the 2 ranks"):
        run_ranks(_groups, 2, 3)
    assert len(run_ranks(_groups, 2, 2)) == 2


def test_expert_parallelism_without_ranks_is_refused():
    with pytest.raises(UserError, match=r"parallel.expert=2 does not divide the 1 ranks"):
        make_layout(expert=2, device=torch.device("cpu"))
