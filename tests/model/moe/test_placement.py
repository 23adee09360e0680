"""Equal shares of every modality's experts where the counts allow it, as near as possible otherwise."""

import math

import pytest

from moe_dist.core.errors import UserError
from moe_dist.model.moe.placement import Placement, make_placement


def groups(*counts):
    starts = [sum(counts[:i]) for i in range(len(counts))]
    return [tuple(range(start, start + count)) for start, count in zip(starts, counts)]


@pytest.mark.parametrize("ep", [1, 2, 4, 8])
@pytest.mark.parametrize("counts", [(7, 1), (6, 2), (4, 4), (8,), (5, 2, 1)])
def test_shares(counts, ep):
    expert_groups = groups(*counts)
    placement = make_placement(expert_groups, ep)
    assert sorted(placement.order) == list(range(8))
    assert [len(rank) for rank in placement.local_experts] == [8 // ep] * ep
    for group in expert_groups:
        held = [len(set(group) & set(rank)) for rank in placement.local_experts]
        assert max(held) - min(held) <= 1


def test_examples():
    assert make_placement(groups(4, 4), 2) == Placement(((0, 1, 4, 5), (2, 3, 6, 7)))
    assert make_placement(groups(7, 1), 2) == Placement(((0, 1, 2, 3), (4, 5, 6, 7)))
    assert make_placement(groups(6, 2), 4) == Placement(((0, 1), (2, 3), (4, 6), (5, 7)))
    assert make_placement(groups(8), 4) == Placement(((0, 1), (2, 3), (4, 5), (6, 7)))


@pytest.mark.parametrize("ep", [2, 4, 8])
@pytest.mark.parametrize("counts", [(7, 1), (6, 2), (4, 4), (5, 2, 1)])
def test_enough_slices_give_every_rank_an_equal_share_of_every_group_and_no_expert_twice(counts, ep):
    slices = ep // math.gcd(ep, *counts)
    placement = make_placement(groups(*counts), ep, slices)
    assert sorted(placement.order) == list(range(8 * slices))
    for rank in placement.local_experts:
        experts = [number % 8 for number in rank]
        assert len(set(experts)) == len(experts)
        assert [ep * len(set(group) & set(experts)) for group in groups(*counts)] == [slices * n for n in counts]


def test_examples_of_slices():
    assert make_placement(groups(2, 1), 2, 2) == Placement(((0, 1, 2), (3, 4, 5)), 2)
    assert make_placement(groups(2, 2), 4, 2) == Placement(((0, 2), (1, 3), (4, 6), (5, 7)), 2)


def test_ranks_that_do_not_divide_the_experts():
    with pytest.raises(UserError, match=r"parallel\.expert=3 does not divide the model's 8 experts"):
        make_placement(groups(7, 1), 3)
    with pytest.raises(UserError, match=r"expert=3 does not divide the model's 8 experts times 2 slices"):
        make_placement(groups(7, 1), 3, 2)
