"""Equal shares of every modality's experts where the counts allow it, as near as possible otherwise."""

import pytest

from moe_dist.errors import UserError
from moe_dist.moe.placement import Placement, make_placement


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


def test_ranks_that_do_not_divide_the_experts():
    with pytest.raises(UserError, match=r"parallel\.expert=3 does not divide the model's 8 experts"):
        make_placement(groups(7, 1), 3)
