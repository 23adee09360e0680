"""The differentiable all-to-all on real ranks, uneven and empty splits among the cases."""

import pytest
import torch
import torch.distributed as dist

from moe_dist.parallel.collectives import all_to_all_rows
from tests.support.distributed import run_ranks

# SPLITS[case][source][destination] rows
SPLITS = {
    "uneven": [[2, 3, 1, 0], [0, 1, 4, 2], [1, 1, 1, 1], [0, 0, 2, 0]],
    "one sender": [[0, 0, 0, 0], [3, 0, 1, 2], [0, 0, 0, 0], [0, 0, 0, 0]],
    "nothing": [[0] * 4] * 4,
}


def _values(rank, splits, width):
    rows = sum(splits[rank])
    return (torch.arange(rows * width).view(rows, width) + 1000 * rank).double()


def _exchange(rank, case, dtype):
    splits = SPLITS[case]
    x = _values(rank, splits, 3).to(dtype).requires_grad_()
    y = all_to_all_rows(x, splits[rank], [row[rank] for row in splits], dist.group.WORLD)
    (y * torch.arange(1, len(y) + 1)[:, None] * (rank + 1)).sum().backward()
    return y.detach().double(), x.grad.double()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", SPLITS)
def test_rows_and_their_gradients(case, dtype):
    splits = SPLITS[case]
    results = run_ranks(_exchange, 4, case, dtype)
    sent = [_values(rank, splits, 3).to(dtype).double().split(splits[rank]) for rank in range(4)]
    factors = []
    for rank, (y, _) in enumerate(results):
        assert torch.equal(y, torch.cat([sent[source][rank] for source in range(4)]))
        factor = torch.arange(1, len(y) + 1).double()[:, None].expand(-1, 3) * (rank + 1)
        factors.append(factor.split([splits[source][rank] for source in range(4)]))
    for rank, (_, gradient) in enumerate(results):
        assert torch.equal(gradient, torch.cat([factors[target][rank] for target in range(4)]))
