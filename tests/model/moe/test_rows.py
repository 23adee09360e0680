"""take_rows and add_up_rows against indexing in float64; each token's rows are added in float32 and rounded once."""

import pytest
import torch

from moe_dist.model.moe.rows import add_up_rows, take_rows

IDS = [torch.tensor(ids, dtype=torch.int64) for ids in ([2, 0, 2, 1, 2], [0] * 300, [], [3, 2, 1, 0])]


@pytest.mark.parametrize("ids", IDS, ids=["several", "all of one", "none", "one each"])
def test_gradients_and_values(ids):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = torch.randn(len(ids), 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(take_rows(x, ids), x[ids])
    expected = torch.stack([y[ids == token].sum(0) for token in range(4)])
    torch.testing.assert_close(add_up_rows(y, ids, 4), expected)
    assert torch.autograd.gradcheck(lambda x: take_rows(x, ids), x)
    assert not len(ids) or torch.autograd.gradcheck(lambda y: add_up_rows(y, ids, 4), y)


def test_bfloat16_rows_are_added_in_float32_both_ways():
    """With 300 rows of 1, a sum in bfloat16 would stop at 256, because the next number is 258."""
    ids = torch.zeros(302, dtype=torch.int64)
    rows = torch.ones(302, 1, dtype=torch.bfloat16)
    assert add_up_rows(rows, ids, 1).item() == 302
    x = torch.ones(1, 1, dtype=torch.bfloat16, requires_grad=True)
    take_rows(x, ids).sum().backward()
    assert x.grad.item() == 302
